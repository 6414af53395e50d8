#include "python.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "../python_tables.h"
#include "decoder.h"

namespace nb = nanobind;
using namespace kvbits;

namespace {
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<float> copied(const std::optional<Floats>& x) {
  return x ? std::vector<float>(x->data(), x->data() + x->size()) : std::vector<float>();
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
}  // namespace

void bind_decoder(nb::module_& m) {
  m.attr("STRIP_OUTPUTS") = kStrip;
  m.def("row_kernels", [](const std::string& isa) { return std::string(rows_for(isa.c_str()).isa); });

  m.def("product_kernels", [](const std::string& isa) { return std::string(products_for(isa.c_str()).isa); });

  nb::class_<Linear>(m, "Linear")
      .def(
          "__init__",
          [](Linear* self, int format, std::optional<Floats> bias, int out, int in) {
            if (weight_format(format) == nullptr) throw nb::value_error("no such format");
            new (self) Linear(format, bias ? bias->data() : nullptr, out, in);
          },
          nb::arg("format"), nb::arg("bias").none(), nb::arg("out_features"), nb::arg("in_features"))
      .def_prop_ro("strips", &Linear::strips)
      .def_prop_ro("bytes", &Linear::bytes)
      .def("fill",
           [](Linear& self, uintptr_t stored, size_t row_bytes, uintptr_t order, int first, int last) {
             nb::gil_scoped_release release;
             self.fill(pointer<uint8_t>(stored), row_bytes, pointer<int64_t>(order), first, last);
           })
      .def("unpack",
           [](const Linear& self, uintptr_t rows, int count, uintptr_t out) {
             nb::gil_scoped_release release;
             unpack_rows(self, pointer<int64_t>(rows), count, pointer<float>(out));
           })
      .def("apply", [](const Linear& self, Cpu& cpu, uintptr_t x, int64_t stride, int rows, uintptr_t y) {
        nb::gil_scoped_release release;
        apply_linear(cpu, self, pointer<uint16_t>(x), stride, rows, pointer<uint16_t>(y));
      });

  nb::class_<DecoderLayer>(m, "DecoderLayer")
      .def(
          "__init__",
          [](DecoderLayer* self, const Linear& query, const Linear& key, const Linear& value, const Linear& output,
             const Linear& gate, const Linear& up, const Linear& down, Floats input_norm, Floats mlp_norm,
             std::optional<Floats> query_norm, std::optional<Floats> key_norm) {
            new (self) DecoderLayer{&query,
                                    &key,
                                    &value,
                                    &output,
                                    &gate,
                                    &up,
                                    &down,
                                    copied(input_norm),
                                    copied(mlp_norm),
                                    copied(query_norm),
                                    copied(key_norm)};
          },
          nb::arg("query"), nb::arg("key"), nb::arg("value"), nb::arg("output"), nb::arg("gate"), nb::arg("up"),
          nb::arg("down"), nb::arg("input_norm"), nb::arg("mlp_norm"), nb::arg("query_norm").none(),
          nb::arg("key_norm").none(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(),
          nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>());

  nb::class_<Decoder>(m, "Decoder")
      .def(
          "__init__",
          [](Decoder* self, int hidden, int heads, int kv_heads, int dim, int rotated, int intermediate, float eps,
             bool gelu, const std::vector<const DecoderLayer*>& layers, Floats final_norm, const Linear& head) {
            std::vector<DecoderLayer> copies;
            for (const DecoderLayer* layer : layers) copies.push_back(*layer);
            const Activation activation = gelu ? Activation::kGeluTanh : Activation::kSilu;
            new (self) Decoder(DecoderShape{hidden, heads, kv_heads, dim, rotated, intermediate, eps, activation},
                               std::move(copies), copied(final_norm), head);
          },
          nb::arg("hidden"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("dim"), nb::arg("rotated"),
          nb::arg("intermediate"), nb::arg("eps"), nb::arg("gelu"), nb::arg("layers"), nb::arg("final_norm"),
          nb::arg("head"), nb::keep_alive<1, 12>())
      .def("forward",
           [](Decoder& self, Cpu& cpu, const std::vector<const Layer*>& layers, const BatchTables& tables, int rows,
              uintptr_t embedded, uintptr_t cos, uintptr_t sin, uintptr_t wanted, int count, uintptr_t logits) {
             if (static_cast<int>(layers.size()) != self.num_layers()) throw nb::value_error("one cache a layer");
             nb::gil_scoped_release release;
             self.forward(cpu, layers, tables.batch, rows, pointer<uint16_t>(embedded), pointer<float>(cos),
                          pointer<float>(sin), pointer<int64_t>(wanted), count, pointer<float>(logits));
           });
}
