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

void bind_linear(nb::module_& m) {
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
      .def("part", [](const Linear& self, int first, int out) { return Linear(self, first, out); })
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
}

// Linears are kept by whoever makes an object that reads them.
void bind_experts(nb::module_& m) {
  nb::class_<Gate>(m, "Gate").def(
      "__init__",
      [](Gate* self, int activation, float alpha, float limit) {
        new (self) Gate{static_cast<Activation>(activation), alpha, limit};
      },
      nb::arg("activation"), nb::arg("alpha"), nb::arg("limit"));

  nb::class_<Experts>(m, "Experts")
      .def(
          "__init__",
          [](Experts* self, const std::vector<const Linear*>& gates, const std::vector<const Linear*>& ups,
             const std::vector<const Linear*>& downs, const Gate& gate) {
            std::vector<Expert> experts;
            for (size_t e = 0; e < gates.size(); ++e) experts.push_back({gates[e], ups.at(e), downs.at(e)});
            new (self) Experts(std::move(experts), gate);
          },
          nb::arg("gates"), nb::arg("ups"), nb::arg("downs"), nb::arg("gate"))
      .def("add", [](const Experts& self, Cpu& cpu, uintptr_t x, int rows, int count, uintptr_t chosen,
                     uintptr_t shares, uintptr_t sums) {
        nb::gil_scoped_release release;
        Experts::Room room;
        self.add(cpu.workers(), LinearKernels(cpu.kernels().isa), pointer<uint16_t>(x), rows,
                 Choice{count, pointer<int32_t>(chosen), pointer<float>(shares)}, pointer<float>(sums), room);
      });

  nb::class_<Mixture>(m, "Mixture")
      .def(
          "__init__",
          [](Mixture* self, const Linear& router, const Experts& experts, int chosen, bool among_chosen) {
            new (self) Mixture{&router, &experts, chosen, among_chosen};
          },
          nb::arg("router"), nb::arg("experts"), nb::arg("chosen"), nb::arg("among_chosen"));
}

void bind_layers(nb::module_& m) {
  nb::class_<DecoderLayer>(m, "DecoderLayer")
      .def(
          "__init__",
          [](DecoderLayer* self, const Linear& query, const Linear& key, const Linear& value, const Linear& output,
             const Linear* gate, const Linear* up, const Linear* down, const Mixture* mixture,
             std::optional<Floats> input_norm, std::optional<Floats> attention_norm, std::optional<Floats> mlp_norm,
             std::optional<Floats> output_norm, std::optional<Floats> query_norm, std::optional<Floats> key_norm,
             std::optional<Floats> sinks, int rope) {
            new (self) DecoderLayer{&query,
                                    &key,
                                    &value,
                                    &output,
                                    gate,
                                    up,
                                    down,
                                    mixture == nullptr ? Mixture{} : *mixture,
                                    copied(input_norm),
                                    copied(attention_norm),
                                    copied(mlp_norm),
                                    copied(output_norm),
                                    copied(query_norm),
                                    copied(key_norm),
                                    copied(sinks),
                                    rope};
          },
          nb::arg("query"), nb::arg("key"), nb::arg("value"), nb::arg("output"), nb::arg("gate").none(),
          nb::arg("up").none(), nb::arg("down").none(), nb::arg("mixture").none(), nb::arg("input_norm").none(),
          nb::arg("attention_norm").none(), nb::arg("mlp_norm").none(), nb::arg("output_norm").none(),
          nb::arg("query_norm").none(), nb::arg("key_norm").none(), nb::arg("sinks").none(), nb::arg("rope"));

  nb::class_<Decoder>(m, "Decoder")
      .def(
          "__init__",
          [](Decoder* self, int hidden, int heads, int kv_heads, int dim, int rotated, float eps, float soft_cap,
             const Gate& gate, const std::vector<const DecoderLayer*>& layers, Floats final_norm, const Linear& head) {
            std::vector<DecoderLayer> copies;
            for (const DecoderLayer* layer : layers) copies.push_back(*layer);
            new (self) Decoder(DecoderShape{hidden, heads, kv_heads, dim, rotated, eps, soft_cap, gate},
                               std::move(copies), copied(final_norm), head);
          },
          nb::arg("hidden"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("dim"), nb::arg("rotated"), nb::arg("eps"),
          nb::arg("soft_cap"), nb::arg("gate"), nb::arg("layers"), nb::arg("final_norm"), nb::arg("head"))
      .def("forward",
           [](Decoder& self, Cpu& cpu, const std::vector<const Layer*>& layers, const BatchTables& tables, int rows,
              uintptr_t embedded, uintptr_t cos, uintptr_t sin, uintptr_t wanted, int count, uintptr_t logits) {
             if (static_cast<int>(layers.size()) != self.num_layers()) throw nb::value_error("one cache a layer");
             nb::gil_scoped_release release;
             self.forward(cpu, layers, tables.batch, rows, pointer<uint16_t>(embedded), pointer<float>(cos),
                          pointer<float>(sin), pointer<int64_t>(wanted), count, pointer<float>(logits));
           });
}
}  // namespace

void bind_decoder(nb::module_& m) {
  m.attr("STRIP_OUTPUTS") = kStrip;
  m.def("row_kernels", [](const std::string& isa) { return std::string(rows_for(isa.c_str()).isa); });
  m.def("product_kernels", [](const std::string& isa) { return std::string(products_for(isa.c_str()).isa); });
  bind_linear(m);
  bind_experts(m);
  bind_layers(m);
}
