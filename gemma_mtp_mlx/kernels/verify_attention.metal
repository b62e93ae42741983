// Attention of a block's queries over what each row has committed and over the block itself.
//
// The H / G x L queries that share a row's keys and values are the rows of 8x8 matrices, packed
// into up to four row tiles of one threadgroup, so that keys and values are read once for all of
// them; only beyond that another threadgroup reads them again. Few queries leave most of a row tile
// empty. That is accepted: such layers are bound by reading keys and values, and one path for every
// number of queries is what makes a query's result independent of that number.
//
// A row's positions are cut, at fixed absolute places, into parts of PART positions, tiles of TILE
// and strips of STRIP; a threadgroup attends over one part. Where a row has one, the sums are
// divided by the total and that is all. Where it may have more, a part's sums, peak and total are
// written as they are, and a second launch joins them in order of position. The first part is the
// one in which the row's first visible position lies, so a sliding layer's rows have few, wherever
// they stand. A part that lies beyond the row's last position, because the host's bound was larger
// than its length, has a total of nothing.
//
// Everything that a query must not see is an exact no-op: a weight is 0 where it is masked, a
// factor is 1 where the peak stays what it was (also at -infinity, where a difference would be
// NaN), and fma(0, value, sum) is sum. So a query's result is the same bit for bit whatever the
// number of queries, rows, parts and simdgroups, and wherever the committed positions end: strips
// and tiles are absolute, an entry is the same read from the cache or from the block, and a tile's
// weights are added by simd_sum with zeros for what is not seen. In which order a matrix product
// adds its terms does not matter for that. Strips that no query of the row sees are not read; where
// a strip is seen in part, lanes of the rest read a seen entry again.

#include "attention_tiles.metal"

// Attend in a launch where every row has one part. out: [B, H, L, D].
template <typename A, typename T>
METAL_FUNC void attend_whole(
    Inputs<T> inputs, Head of, uint group, Place<typename A::Run> place, device T* out) {
  A work;
  work.take(inputs, of, group, place);
  work.attend(of.seen.first, of.seen.last);
  const long first = long(of.row * inputs.heads + of.head) * work.queries.rows;
  work.write_sums(out + first * A::D, true);
}

// Attend over the batch's part number `part`, which is number `number` of its row's. weighted:
// [parts, H, L, D]; peaks, totals: [parts, H, L].
template <typename A, int PART, typename T>
METAL_FUNC void attend_part(
    Inputs<T> inputs, Head of, uint group, Place<typename A::Run> place, int part, int number,
    device float* weighted, device float* peaks, device float* totals) {
  const int start = (of.seen.first / PART + number) * PART;
  A work;
  work.take(inputs, of, group, place);
  work.attend(max(of.seen.first, start), min(of.seen.last, start + PART - 1));
  const long first = long(part * inputs.heads + of.head) * work.queries.rows;
  work.write_sums(weighted + first * A::D, false);
  work.write_stats(peaks + first, totals + first);
}

// The row of part number `part` of the batch. offsets: [B + 1], the parts before each row's.
template <typename Offsets> METAL_FUNC int row_of(Offsets offsets, int part) {
  int row = 0;
  while (offsets[row + 1] <= part) {
    row++;
  }
  return row;
}

// Join parts [first, end) of one of a row's `queries`, to out [D]. weighted: [parts, queries, D];
// peaks, totals: [parts, queries].
template <int D, int THREADS, typename T, typename Stats>
METAL_FUNC void join_parts(
    const device float* weighted, Stats peaks, Stats totals, int first, int end, int queries,
    int query, device T* out, int thread_index) {
  float peak = -INFINITY;
  for (int part = first; part < end; part++) {
    peak = max(peak, peaks[part * queries + query]);
  }
  for (int d = thread_index; d < D; d += THREADS) {
    float total = 0.0f, sum = 0.0f;
    for (int part = first; part < end; part++) {
      const int index = part * queries + query;
      const float factor = peaks[index] == peak ? 1.0f : exp(peaks[index] - peak);
      total = fma(totals[index], factor, total);
      sum = fma(weighted[long(index) * D + d], factor, sum);
    }
    out[d] = T(sum / total);
  }
}
