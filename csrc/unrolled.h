// Loops that are gone before the compiler decides which arrays can live in registers.
#pragma once
#include <utility>

// For the bodies: a call that is inlined only later leaves its arrays in memory.
#define KVBITS_INLINE __attribute__((always_inline))

template <class Body, int... I>
[[gnu::always_inline]] static inline void each_of(Body&& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

// body(0), ..., body(N - 1), the index a compile-time constant. An array that is indexed only by such constants stays
// in registers; with plain nested loops GCC 12 keeps a copy in memory and stores it in every iteration.
template <int N, class Body>
[[gnu::always_inline]] static inline void unrolled(Body&& body) {
  each_of(std::forward<Body>(body), std::make_integer_sequence<int, N>{});
}
