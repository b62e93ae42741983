// The gated activation of Gemma's feed-forward layers.

// gelu(gate) * up with the tanh form of gelu in float32; rounded to T before the product and after.
template <typename T> METAL_FUNC T geglu(T gate, T up) {
  const float g = float(gate);
  const float root = 0.7978845608028654f; // sqrt(2 / pi)
  const float inner = g * fma(root * 0.044715f, g * g, root);
  const T activated = T(g * fma(0.5f, precise::tanh(inner), 0.5f));
  return T(float(activated) * float(up));
}
