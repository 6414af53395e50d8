// The Python face of the attention kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "coder.h"
#include "decoder/python.h"
#include "python_tables.h"
#include "step.h"

namespace nb = nanobind;
using namespace kvbits;

namespace {
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
}  // namespace

NB_MODULE(_native, m) {
  // A program that ends does not collect what it leaves (kvbits.cli.main), which is no leak.
  nb::set_leak_warnings(false);
  m.doc() = "C++ kernels of kvbits; used by kvbits.kernels.cpu only";
  m.attr("PAGE_TOKENS") = kPage;
  m.attr("SPLIT_PAGES") = kSplitPages;
  m.attr("MAX_DIM") = kMaxDim;

  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const char* name : available_isas()) names.emplace_back(name);
    return names;
  });

  nb::class_<Place>(m, "Place")
      .def(nb::init<int32_t, int32_t, int32_t, int64_t, int64_t, int64_t>(), nb::arg("key_codec"),
           nb::arg("value_codec"), nb::arg("frame"), nb::arg("offset"), nb::arg("head_bytes"), nb::arg("value_offset"));

  nb::class_<Layer>(m, "Layer")
      .def(
          "__init__",
          [](Layer* self, int heads, int kv_heads, int key_dim, int value_dim, float scale, float softcap, int window,
             Place sealed, Place open, std::optional<Place> sink, int64_t frame_bytes, uintptr_t buffer,
             uintptr_t key_feedback, uintptr_t value_feedback, uintptr_t key_clip, uintptr_t value_clip,
             uintptr_t key_order, uintptr_t value_order, bool latent) {
            new (self) Layer{heads,
                             kv_heads,
                             key_dim,
                             value_dim,
                             scale,
                             softcap,
                             window,
                             sealed,
                             open,
                             sink.value_or(sealed),
                             sink.has_value(),
                             frame_bytes,
                             pointer<uint8_t>(buffer),
                             pointer<float>(key_feedback),
                             pointer<float>(value_feedback),
                             pointer<float>(key_clip),
                             pointer<float>(value_clip),
                             pointer<int32_t>(key_order),
                             pointer<int32_t>(value_order),
                             latent};
          },
          nb::arg("heads"), nb::arg("kv_heads"), nb::arg("key_dim"), nb::arg("value_dim"), nb::arg("scale"),
          nb::arg("softcap"), nb::arg("window"), nb::arg("sealed"), nb::arg("open"), nb::arg("sink").none(),
          nb::arg("frame_bytes"), nb::arg("buffer"), nb::arg("key_feedback"), nb::arg("value_feedback"),
          nb::arg("key_clip"), nb::arg("value_clip"), nb::arg("key_order"), nb::arg("value_order"), nb::arg("latent"));

  nb::class_<BatchTables>(m, "Batch")
      .def(
          "__init__",
          [](BatchTables* self, Table starts, Table counts, Table rows, Table sealed, Table head, Table tail,
             Table sink, bool draft) {
            const Batch batch{static_cast<int32_t>(starts.shape(0)),
                              static_cast<int32_t>(sealed.shape(1)),
                              static_cast<int32_t>(head.shape(1)),
                              static_cast<int32_t>(sink.shape(1)),
                              starts.data(),
                              counts.data(),
                              rows.data(),
                              sealed.data(),
                              head.data(),
                              tail.data(),
                              sink.data(),
                              draft};
            new (self) BatchTables{std::move(starts), std::move(counts), std::move(rows), std::move(sealed),
                                   std::move(head),   std::move(tail),   std::move(sink), batch};
          },
          nb::arg("starts"), nb::arg("counts"), nb::arg("rows"), nb::arg("sealed"), nb::arg("head"), nb::arg("tail"),
          nb::arg("sink"), nb::arg("draft"));

  nb::class_<Cpu>(m, "Cpu")
      .def(
          "__init__",
          [](Cpu* self, const std::string& isa, int threads, uintptr_t gomp_parallel) {
            const Kernels* kernels = kernels_for(isa.c_str());
            if (kernels == nullptr) throw nb::value_error(("no kernels for '" + isa + "' on this processor").c_str());
            if (threads < 1) throw nb::value_error("threads must be positive");
            new (self) Cpu(*kernels, threads, reinterpret_cast<Workers::GompParallel>(gomp_parallel));
          },
          nb::arg("isa"), nb::arg("threads"), nb::arg("gomp_parallel"))
      .def_prop_ro("isa", [](const Cpu& self) { return std::string(self.kernels().isa); })
      .def_prop_ro("threads", &Cpu::threads)
      .def("codecs",
           [](const Cpu& self) {
             nb::list found;
             CodecSides codec;
             for (int i = 0; self.kernels().codec(i, &codec); ++i) {
               found.append(nb::make_tuple(codec.id, codec.key, codec.value));
             }
             return found;
           })
      .def("many_rows",
           [](const Cpu& self) {
             nb::list found;
             CodecSides codec;
             for (int i = 0; self.kernels().codec(i, &codec); ++i) {
               const bool key = codec.key && self.kernels().key(codec.id)->score_many;
               const bool value = codec.value && self.kernels().value(codec.id)->accumulate_many;
               if (key || value) found.append(nb::make_tuple(codec.id, key, value));
             }
             return found;
           })
      .def("supports",
           [](const Cpu& self, int key_codec, int value_codec) -> nb::object {
             Layer layer{};
             layer.sealed.key_codec = key_codec;
             layer.sealed.value_codec = value_codec;
             const char* reason = self.supports(layer);
             return reason ? nb::cast(std::string(reason)) : nb::none();
           })
      .def("opens_latents", [](const Cpu& self, int codec) { return self.kernels().latent(codec) != nullptr; })
      .def("forward",
           [](Cpu& self, const Layer& layer, const BatchTables& tables, bool is_float32, uintptr_t query,
              int64_t query_row, int64_t query_head, uintptr_t key, int64_t key_row, int64_t key_head, uintptr_t value,
              int64_t value_row, int64_t value_head, uintptr_t sinks, uintptr_t out, bool again) {
             const Rows rows{is_float32 ? Float::kF32 : Float::kBf16,
                             pointer<void>(query),
                             pointer<void>(key),
                             pointer<void>(value),
                             query_row,
                             query_head,
                             key_row,
                             key_head,
                             value_row,
                             value_head,
                             pointer<float>(sinks),
                             pointer<void>(out)};
             nb::gil_scoped_release release;
             self.forward(layer, tables.batch, rows, again);
           });

  nb::class_<Coded>(m, "Coded")
      .def(
          "__init__",
          [](Coded* self, int codec, bool key, int pages, int heads, int dim, uintptr_t rows, int64_t row, int64_t head,
             uintptr_t sealed, int64_t page_bytes, int64_t head_bytes) {
            new (self) Coded{
                codec,      pages,     heads, dim, key, pointer<uint16_t>(rows), row, head, pointer<uint8_t>(sealed),
                page_bytes, head_bytes};
          },
          nb::arg("codec"), nb::arg("key"), nb::arg("pages"), nb::arg("heads"), nb::arg("dim"), nb::arg("rows"),
          nb::arg("row"), nb::arg("head"), nb::arg("sealed"), nb::arg("page_bytes"), nb::arg("head_bytes"));
  m.def("encode", [](const Cpu& cpu, const Coded& coded, uintptr_t feedback, uintptr_t order, uintptr_t clip) {
    nb::gil_scoped_release release;
    return encode(cpu.kernels(), coded, pointer<float>(feedback), pointer<int32_t>(order), pointer<float>(clip));
  });
  m.def("decode", [](const Cpu& cpu, const Coded& coded) {
    nb::gil_scoped_release release;
    return decode(cpu.kernels(), coded);
  });

  bind_decoder(m);
}
