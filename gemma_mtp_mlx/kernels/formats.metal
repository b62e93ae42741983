// Weights in MLX's formats, decoded to float32: by mx.quantize's modes, or not quantised (PLAIN).

constant constexpr int RUNS = 4; // of a unit, see weights.metal

enum Format { PLAIN, AFFINE, MXFP4, MXFP8, NVFP4 };

struct Scale {
  float factor;
  float offset;
};

METAL_FUNC float e2m1(uint bits) {
  const half magnitude = as_type<half>(ushort((bits & 7) << 9));
  return (bits & 8 ? -16384.0f : 16384.0f) * float(magnitude);
}

METAL_FUNC float e4m3(uint bits) {
  const half magnitude = as_type<half>(ushort((bits & 127) << 7));
  return (bits & 128 ? -256.0f : 256.0f) * float(magnitude);
}

METAL_FUNC float e8m0(uint bits) {
  return as_type<float>(bits == 0 ? 0x400000u : bits << 23);
}

template <typename W> METAL_FUNC float number(uint bits) { return float(as_type<W>(ushort(bits))); }
template <> METAL_FUNC float number<float>(uint bits) { return as_type<float>(bits); }

// Each format: what a code stands for, the scale of its group, and the weight of both.
template <int FORMAT, typename W, typename S> struct Decode;

template <typename W, typename S> struct Decode<PLAIN, W, S> {
  static METAL_FUNC float code(uint bits) { return number<W>(bits); }
  static METAL_FUNC Scale scale(const device S*, const device S*, size_t) { return {1.0f, 0.0f}; }
  static METAL_FUNC float weight(float code, Scale) { return code; }
};

template <typename W, typename S> struct Decode<AFFINE, W, S> {
  static METAL_FUNC float code(uint bits) { return float(bits); }
  static METAL_FUNC Scale scale(const device S* scales, const device S* biases, size_t i) {
    return {float(scales[i]), float(biases[i])};
  }
  static METAL_FUNC float weight(float code, Scale scale) {
    return fma(scale.factor, code, scale.offset);
  }
};

// Products of these codes and scales are exact in float32.
template <typename W, typename S> struct Decode<MXFP4, W, S> {
  static METAL_FUNC float code(uint bits) { return e2m1(bits); }
  static METAL_FUNC Scale scale(const device S* scales, const device S*, size_t i) {
    return {e8m0(scales[i]), 0.0f};
  }
  static METAL_FUNC float weight(float code, Scale scale) { return scale.factor * code; }
};

template <typename W, typename S> struct Decode<MXFP8, W, S> {
  static METAL_FUNC float code(uint bits) { return e4m3(bits); }
  static METAL_FUNC Scale scale(const device S* scales, const device S*, size_t i) {
    return {e8m0(scales[i]), 0.0f};
  }
  static METAL_FUNC float weight(float code, Scale scale) { return scale.factor * code; }
};

template <typename W, typename S> struct Decode<NVFP4, W, S> {
  static METAL_FUNC float code(uint bits) { return e2m1(bits); }
  static METAL_FUNC Scale scale(const device S* scales, const device S*, size_t i) {
    return {e4m3(scales[i]), 0.0f};
  }
  static METAL_FUNC float weight(float code, Scale scale) { return scale.factor * code; }
};

// ---- a matrix in device memory -----------------------------------------------------------------

// W [n, k] of BITS a weight, packed from the lowest bit up; scales and biases [n, k / GROUP].
template <int FORMAT_, int BITS_, int GROUP_, int RUN_, typename W_, typename S_> struct Weights {
  typedef W_ W;
  typedef S_ S;
  typedef Decode<FORMAT_, W_, S_> Decoder;
  enum : int {
    BITS = BITS_,
    GROUP = GROUP_,
    RUN = RUN_,
    UNIT = RUNS * RUN_,
    SCALES = GROUP_ < UNIT ? UNIT / GROUP_ : 1, // of a unit
  };
  const device W* codes;
  const device S* scales;
  const device S* biases;
  uint n;
  uint k;

  // The matrix `index` of [..., n, k].
  METAL_FUNC Weights at(uint index) const {
    const size_t row = size_t(index) * n;
    Weights m = *this;
    m.codes = (const device W*)bytes(row);
    m.scales = scales + row * (k / GROUP);
    m.biases = biases + row * (k / GROUP);
    return m;
  }

  METAL_FUNC const device uchar* bytes(size_t row) const {
    return (const device uchar*)codes + row * (k / 8 * BITS);
  }

  METAL_FUNC Scale scale(uint row, uint column) const {
    return Decoder::scale(scales, biases, size_t(row) * (k / GROUP) + column / GROUP);
  }
};

template <int FORMAT, int BITS, int GROUP, int RUN, typename W, typename S>
METAL_FUNC Weights<FORMAT, BITS, GROUP, RUN, W, S>
weights(const device W* codes, const device S* scales, const device S* biases, uint n, uint k) {
  return {codes, scales, biases, n, k};
}

// LENGTH neighbouring weights of one row, still packed; the first is a multiple of LENGTH.
template <typename M, int LENGTH = M::RUN> struct Run {
  enum : int { BYTES = LENGTH * M::BITS / 8, WORDS = (BYTES + 3) / 4 };
  uint words[WORDS];

  METAL_FUNC void load(M m, uint row, uint first) {
    const device uchar* p = m.bytes(row) + first / 8 * M::BITS;
    if (BYTES % 16 == 0) {
#pragma unroll
      for (int i = 0; i < BYTES / 16; i++) {
        const uint4 four = ((const device uint4*)p)[i];
        words[4 * i] = four.x;
        words[4 * i + 1] = four.y;
        words[4 * i + 2] = four.z;
        words[4 * i + 3] = four.w;
      }
    } else if (BYTES % 8 == 0) {
#pragma unroll
      for (int i = 0; i < BYTES / 8; i++) {
        const uint2 two = ((const device uint2*)p)[i];
        words[2 * i] = two.x;
        words[2 * i + 1] = two.y;
      }
    } else if (BYTES % 4 == 0) {
      load_pieces((const device uint*)p);
    } else if (BYTES % 2 == 0) {
      load_pieces((const device ushort*)p);
    } else {
      load_pieces(p);
    }
  }

  // Weight i, a constant once loops are unrolled.
  METAL_FUNC float weight(int i, Scale scale) const {
    const int bit = i * M::BITS;
    uint bits = words[bit / 32] >> (bit % 32);
    if (bit % 32 + M::BITS > 32) {
      bits |= words[bit / 32 + 1] << (32 - bit % 32);
    }
    bits &= 0xFFFFFFFFu >> (32 - M::BITS);
    return M::Decoder::weight(M::Decoder::code(bits), scale);
  }

  template <typename U> METAL_FUNC void load_pieces(const device U* p) {
    constexpr int SIZE = sizeof(U);
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      words[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < BYTES / SIZE; i++) {
      words[i * SIZE / 4] |= uint(p[i]) << (i * SIZE % 4 * 8);
    }
  }
};
