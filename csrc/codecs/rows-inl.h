// From a block's number of rows to a kernel made for it. Included inside a per-ISA anonymous namespace.

// body(rows) for the block's number of rows as a compile-time constant.
template <class Body>
inline void with_rows(int count, Body&& body) {
  static_assert(kBlockRows == 4);
  switch (count) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    default:
      return body(std::integral_constant<int, 4>{});
  }
}

template <class K>
void score_any(const Block& block, int dim) {
  with_rows(block.count, [&](auto rows) {
    typename K::Folded folded;
    K::template fold<rows>(block, dim, folded);
    K::template score_rows<rows>(block, dim, folded);
  });
}

template <class V>
void accumulate_any(const Block& block, int dim) {
  with_rows(block.count, [&](auto rows) {
    typename V::Folded folded;
    V::template fold<rows>(block, dim, folded);
    V::template accumulate_rows<rows>(block, dim, folded);
  });
}
