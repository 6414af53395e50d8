// Attention on tiles: included inside isa/amx*.cpp's anonymous namespace, after simd/avx512-inl.h, the tiles and
// `kIsa`. What is not here is the vectors' (isa/avx512.cpp).
// clang-format off: the order is the dependency
#include "../codecs/planes-inl.h"
#include "../codecs/quantize-inl.h"
#include "../codecs/raw-inl.h"
#include "../codecs/formats-inl.h"
#include "../codecs/codebook-inl.h"
#include "../codecs/affine-inl.h"
#include "../codecs/seal-inl.h"
#include "../codecs/float8-inl.h"
#include "../codecs/compose-inl.h"
#include "../codecs/rows-inl.h"
#include "../softmax-inl.h"
#include "products-inl.h"
#include "affine-inl.h"
#include "floats-inl.h"
#include "table-inl.h"
// clang-format on
