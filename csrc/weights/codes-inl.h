// Codes of weights as vectors of unsigned bytes, four inputs of one output in each 32-bit lane.

// Quads 2 * STEP and 2 * STEP + 1 of the group, of the outputs from `lane` on.
template <int BITS, int STEP>
inline void load_quads(const uint8_t* codes, int lane, B (&quads)[2]) {
  if constexpr (BITS == 8) {
    quads[0] = b_load(codes + (2 * STEP * kStrip + lane) * 4);
    quads[1] = b_load(codes + ((2 * STEP + 1) * kStrip + lane) * 4);
  } else {
    const B both = b_load(codes + (STEP * kStrip + lane) * 4);
    quads[0] = b_extract<0, 0x0f>(both);
    quads[1] = b_extract<4, 0x0f>(both);
    constexpr int kPlanes = kStrip * kGroup / 2;
    if constexpr (BITS == 5) {
      const B plane = b_load(codes + kPlanes + lane * 4);
      quads[0] = b_or(quads[0], b_extract<2 * STEP - 4, 0x10>(plane));
      quads[1] = b_or(quads[1], b_extract<2 * STEP + 1 - 4, 0x10>(plane));
    }
    if constexpr (BITS == 6) {
      const B plane = b_load(codes + kPlanes + (STEP / 2 * kStrip + lane) * 4);
      quads[0] = b_or(quads[0], b_extract<4 * (STEP % 2) - 4, 0x30>(plane));
      quads[1] = b_or(quads[1], b_extract<4 * (STEP % 2) + 2 - 4, 0x30>(plane));
    }
  }
}
