// What verify_attention reads, where it lies: queries, committed keys and values, the block.
//
// Everything is read in place, whatever its strides are, and a position is looked up one by one: in
// the row's segment of a full layer's pool or in its ring of a sliding layer's storage, at an index
// that depends on nothing but the position, or in the block if it is not committed yet. Offsets are
// 64 bits wide: a pool of many long rows has more than 2^31 elements.

// The positions that the queries of one row see.
struct Seen {
  int first;     // that any query sees
  int own;       // the last one that the first query sees
  int last;      // that any query sees
  int committed; // positions from here on are the block's
};

// The first query lies BEHIND positions before the end of what is committed.
template <int WINDOW, int BEHIND> METAL_FUNC Seen seen_by(int committed, int length) {
  const int own = committed - BEHIND;
  return {WINDOW ? max(own + 1 - WINDOW, 0) : 0, own, own + length - 1, committed};
}

// A tensor in place. strides: in elements; the last dimension is contiguous.
template <typename T> struct Tensor {
  const device T* data;
  const constant int64_t* strides;

  METAL_FUNC const device T* at(int i, int j) const {
    return data + i * strides[0] + j * strides[1];
  }
};

// The keys or the values of one row and head, wherever they are.
template <typename T, int RING> struct Entries {
  const device T* stored; // the row's segment or ring
  long stored_stride;
  const device T* fresh; // the block
  long fresh_stride;

  METAL_FUNC const device T* at(int position, Seen seen) const {
    position = clamp(position, seen.first, seen.last);
    if (position >= seen.committed) {
      return fresh + (position - seen.committed) * fresh_stride;
    }
    return stored + (RING ? position % (RING ? RING : 1) : position) * stored_stride;
  }
};

// The queries of one row that share keys and values: number r is position r % length of head
// r / length.
template <typename T> struct Queries {
  const device T* first;
  long head_stride;
  long stride;
  int length;
  int rows;

  METAL_FUNC int position(int r) const { return min(r, rows - 1) % length; }
  METAL_FUNC const device T* at(int r) const {
    r = min(r, rows - 1);
    return first + r / length * head_stride + r % length * stride;
  }
};

// One row and one of its key and value heads. home: where the row's segment of a pool starts, or
// the number of its ring.
struct Head {
  int row;
  int head;
  int home;
  Seen seen;
};

// queries: [B, H, L, D]; keys, values: [G, N, D]; block_keys, block_values: [B, G, L, D].
template <typename T> struct Inputs {
  Tensor<T> queries, keys, values, block_keys, block_values;
  int query_heads, length, heads;

  METAL_FUNC Queries<T> queries_of(Head of) const {
    const int shared = query_heads / heads;
    const device T* first = queries.at(of.row, of.head * shared);
    return {first, queries.strides[1], queries.strides[2], length, shared * length};
  }

  template <int RING>
  METAL_FUNC static Entries<T, RING> entries_of(Head of, Tensor<T> storage, Tensor<T> block) {
    const device T* stored = storage.at(of.head, 0) + of.home * max(RING, 1) * storage.strides[1];
    return {stored, storage.strides[1], block.at(of.row, of.head), block.strides[2]};
  }
};
