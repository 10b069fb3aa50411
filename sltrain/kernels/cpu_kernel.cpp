// Products with an unstructured or block S, float32. What they compute, and why so: cpu_kernel.py.
//
// n tokens; `in` columns of x; T tokens in a tile, of which m are in use; W floats in a vector register. Matrices are
// row-major. A panel is a part of a tile, the tokens of some columns: transposed for entries, as they are for blocks.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

// Weak: the library that torch has loaded, whatever it is called; null where there is none.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" __attribute__((weak)) int omp_get_thread_num();
extern "C" __attribute__((weak)) int omp_get_num_threads();

namespace {
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef int64_t I;
typedef float V __attribute__((vector_size(4 * W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4)));
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE V load(const float* p) { return *(const Unaligned*)p; }
INLINE void store(float* p, V v) { *(Unaligned*)p = v; }
INLINE V spread(float f) { return f - V{}; }
INLINE void keep(V& v) {  // in a register: what is used twice would otherwise be loaded twice
#if defined(__x86_64__)
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}
constexpr I round_up(I n, I to) { return (n + to - 1) / to * to; }

// ---- Shuffles. P::at(l) is the lane of (a, b) that becomes lane l. Four lanes are one 128-bit piece of a register.

template <class P, size_t... L> INLINE V pick(V a, V b, std::index_sequence<L...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, P::at(L)...);
#else
  typedef int32_t Lanes __attribute__((vector_size(4 * W)));
  return __builtin_shuffle(a, b, Lanes{P::at(L)...});
#endif
}
template <class P> INLINE V pick(V a, V b) { return pick<P>(a, b, std::make_index_sequence<W>()); }
template <int K> struct Unpack {  // within pieces: a0 b0 a1 b1 (K = 0), a2 b2 a3 b3 (K = 2)
  static constexpr int at(int l) { return (l & ~3) + ((l & 3) >> 1) + (l & 1) * W + K; }
};
template <int K> struct Pair {  // within pieces: a0 a1 b0 b1 (K = 0), a2 a3 b2 b3 (K = 2)
  static constexpr int at(int l) { return (l & ~3) + (l & 1) + ((l >> 1) & 1) * W + K; }
};
template <int K> struct Half {  // the lower (K = 0) or upper (K = W / 2) halves of a and b
  static constexpr int at(int l) { return l < W / 2 ? l + K : l + W / 2 + K; }
};
template <int K> struct Every {  // the even (K = 0) or odd (K = 4) pieces of a and b
  static constexpr int at(int l) { return (l & 3) + (l >> 2) * 8 + K; }
};

// r[i] lane j <-> r[j] lane i: first inside pieces, then the pieces themselves.
INLINE void transpose(V* r) {
  UNROLL for (int i = 0; i < W; i += 4) {
    V a = pick<Unpack<0>>(r[i], r[i + 1]), b = pick<Unpack<2>>(r[i], r[i + 1]);
    V c = pick<Unpack<0>>(r[i + 2], r[i + 3]), d = pick<Unpack<2>>(r[i + 2], r[i + 3]);
    r[i] = pick<Pair<0>>(a, c), r[i + 1] = pick<Pair<2>>(a, c);
    r[i + 2] = pick<Pair<0>>(b, d), r[i + 3] = pick<Pair<2>>(b, d);
  }
  if constexpr (W == 8) UNROLL for (int i = 0; i < 4; ++i) {
    V a = r[i], b = r[i + 4];
    r[i] = pick<Half<0>>(a, b), r[i + 4] = pick<Half<W / 2>>(a, b);
  }
  if constexpr (W == 16) UNROLL for (int i = 0; i < 4; ++i) {
    V a = pick<Half<0>>(r[i], r[i + 4]), b = pick<Half<W / 2>>(r[i], r[i + 4]);
    V c = pick<Half<0>>(r[i + 8], r[i + 12]), d = pick<Half<W / 2>>(r[i + 8], r[i + 12]);
    r[i] = pick<Every<0>>(a, c), r[i + 4] = pick<Every<4>>(a, c);
    r[i + 8] = pick<Every<0>>(b, d), r[i + 12] = pick<Every<4>>(b, d);
  }
}

// Lane i of the result is the sum of the lanes of r[i].
INLINE V sums(const V* given) {
  V r[W];
  UNROLL for (int i = 0; i < W; i += 2)
    r[i] = pick<Unpack<0>>(given[i], given[i + 1]) + pick<Unpack<2>>(given[i], given[i + 1]);
  UNROLL for (int i = 0; i < W; i += 4) r[i] = pick<Pair<0>>(r[i], r[i + 2]) + pick<Pair<2>>(r[i], r[i + 2]);
  if constexpr (W >= 8) UNROLL for (int i = 0; i < W; i += 8)
    r[i] = pick<Half<0>>(r[i], r[i + 4]) + pick<Half<W / 2>>(r[i], r[i + 4]);
  if constexpr (W == 16) return pick<Every<0>>(r[0], r[8]) + pick<Every<4>>(r[0], r[8]);
  return r[0];
}

// ---- Tiles. Panel (w, T) <-> columns c0 .. c0 + w - 1 of m rows of a matrix with `cols` columns. Rows are far apart,
// often by a power of two, so several cache lines of one are worked on before the next: P columns at a time.

constexpr I P = 64;

template <int T> INLINE void read_panel(const float* matrix, I m, I cols, I c0, float* panel) {
  I end = std::min(c0 + P, cols), c = c0;
  for (I t = 0; t < T; t += W)
    for (c = c0; c + W <= end; c += W) {
      V r[W];
      const float* from = matrix + t * cols + c;
      if (t + W <= m) UNROLL for (int i = 0; i < W; ++i) r[i] = load(from + i * cols);
      else for (int i = 0; i < W; ++i) r[i] = t + i < m ? load(from + i * cols) : V{};
      transpose(r);
      UNROLL for (int i = 0; i < W; ++i) *(V*)(panel + (c - c0 + i) * T + t) = r[i];
    }
  for (; c < end; ++c)
    for (I t = 0; t < T; ++t) panel[(c - c0) * T + t] = t < m ? matrix[t * cols + c] : 0.f;
}
template <int T> INLINE void write_panel(const float* panel, I m, I cols, I c0, float* matrix) {
  I end = std::min(c0 + P, cols), c = c0;
  for (I t = 0; t < m; t += W)
    for (c = c0; c + W <= end; c += W) {
      V r[W];
      float* to = matrix + t * cols + c;
      UNROLL for (int i = 0; i < W; ++i) r[i] = *(const V*)(panel + (c - c0 + i) * T + t);
      transpose(r);
      if (t + W <= m) UNROLL for (int i = 0; i < W; ++i) store(to + i * cols, r[i]);
      else for (int i = 0; t + i < m; ++i) store(to + i * cols, r[i]);
    }
  for (; c < end; ++c)
    for (I t = 0; t < m; ++t) matrix[t * cols + c] = panel[(c - c0) * T + t];
}

// ---- Memory and threads

struct Space {
  float* data = nullptr;
  I size = 0;
  float* get(I n) {
    if (n > size) {
      free(data), data = nullptr, size = 0;
      void* p = nullptr;
      if (posix_memalign(&p, 4096, n * sizeof(float))) throw std::bad_alloc();
      data = (float*)p, size = n;
    }
    return data;
  }
  float* zeros(I n) { return (float*)memset(get(std::max<I>(n, 1)), 0, n * sizeof(float)); }
  ~Space() { free(data); }
};
thread_local Space tile_space;  // kept between calls: fresh pages would cost as much as the products

template <class F> struct Job { const F* work; I parts; bool failed; };
template <class F> void run_job(void* p) {
  auto* job = (Job<F>*)p;
  I step = omp_get_num_threads();
  try {
    for (I part = omp_get_thread_num(); part < job->parts; part += step) (*job->work)(part);
  } catch (...) { job->failed = true; }
}
bool has_threads() { return GOMP_parallel && omp_get_thread_num && omp_get_num_threads; }
template <class F> void parallel(I parts, I threads, const F& work) {
  Job<F> job{&work, parts, false};
  if (parts > 1 && has_threads()) GOMP_parallel(run_job<F>, &job, (unsigned)threads, 0);
  else for (I part = 0; part < parts; ++part) work(part);
  if (job.failed) throw std::bad_alloc();
}

struct Problem {
  I block, n, in, count, threads;  // `count` matrices S
  const float* x;
  const float* const* values;
  const int32_t* const* places;  // flat positions, or block numbers
  const I *num, *outs;           // how many of them, rows of S
  I parts(I T) const { return std::max<I>(1, std::min(threads, (n + T - 1) / T)); }
  void check() const {
    for (I g = 0; g < count; ++g) {
      I b = std::max<I>(block, 1), end = ((outs[g] + b - 1) / b) * ((in + b - 1) / b), last = 0;
      bool wrong = false;
      for (I k = 0; k < num[g]; ++k) wrong |= places[g][k] < last, last = places[g][k];
      if (wrong || last >= std::max<I>(end, 1)) throw 2;
    }
  }
};
// Calls work(n0, m) for the tiles of one part; which tiles depends on n, T and the number of parts alone.
template <class F> INLINE void each_tile(const Problem& p, I T, I part, I parts, const F& work) {
  I tiles = (p.n + T - 1) / T;
  for (I i = tiles * part / parts; i < tiles * (part + 1) / parts; ++i) work(i * T, std::min(T, p.n - i * T));
}
// Tokens in a tile of `width` columns: few enough for the cache and to give each thread one.
I tile_tokens(const Problem& p, I width) {
  I T = 64;
  while (T > 16 && (T * width * 4 > 800 * 1024 || T / 2 * p.threads >= p.n)) T /= 2;
  return T;
}

// ---- Entries

template <int T> void sparse_forward(const Problem& p, float* const* ys) {
  std::vector<std::vector<I>> starts(p.count);  // of each row of each S
  for (I g = 0; g < p.count; ++g)
    for (I r = 0, k = 0; r <= p.outs[g]; ++r) {
      while (k < p.num[g] && p.places[g][k] < r * p.in) ++k;
      starts[g].push_back(k);
    }
  I parts = p.parts(T);
  parallel(parts, p.threads, [&](I part) {
    float* tile = tile_space.get(p.in * T);
    alignas(64) float panel[P * T];
    each_tile(p, T, part, parts, [&](I n0, I m) {
      for (I c = 0; c < p.in; c += P) read_panel<T>(p.x + n0 * p.in, m, p.in, c, tile + c * T);
      for (I g = 0; g < p.count; ++g)
        for (I r0 = 0; r0 < p.outs[g]; r0 += P) {
          for (I r = r0; r < std::min(r0 + P, p.outs[g]); ++r) {
            V acc[T / W] = {};
            for (I k = starts[g][r]; k < starts[g][r + 1]; ++k) {
              const float* x = tile + (p.places[g][k] - r * p.in) * T;
              V v = spread(p.values[g][k]);
              UNROLL for (int u = 0; u < T / W; ++u) acc[u] += v * *(const V*)(x + u * W);
            }
            UNROLL for (int u = 0; u < T / W; ++u) *(V*)(panel + (r - r0) * T + u * W) = acc[u];
          }
          write_panel<T>(panel, m, p.outs[g], r0, ys[g] + n0 * p.outs[g]);
        }
    });
  });
}

// All S stacked on each other, entries ordered by column; row: in the stack.
struct Columns {
  std::vector<I> start;
  std::vector<int32_t> row, from;  // from: the entry's number in the given order
  std::vector<float> value;
  explicit Columns(const Problem& p) : start(p.in + 1) {
    I total = 0;
    for (I g = 0; g < p.count; ++g) total += p.num[g];
    std::vector<int32_t> rows(total), columns(total);
    row.resize(total), from.resize(total), value.resize(total);
    for (I g = 0, k = 0, offset = 0; g < p.count; offset += p.outs[g++])
      for (I j = 0, r = 0; j < p.num[g]; ++j, ++k) {
        if (p.places[g][j] >= (r + 1) * p.in) r = p.places[g][j] / p.in;
        rows[k] = offset + r, columns[k] = p.places[g][j] - r * p.in;
        ++start[columns[k] + 1];
      }
    for (I c = 0; c < p.in; ++c) start[c + 1] += start[c];
    std::vector<I> next(start);
    for (I g = 0, k = 0; g < p.count; ++g)
      for (I j = 0; j < p.num[g]; ++j, ++k) {
        I to = next[columns[k]]++;
        row[to] = rows[k], from[to] = k, value[to] = p.values[g][j];
      }
  }
};

template <int T> void sparse_backward(const Problem& p, const float* const* grads, float* dx, float* const* dvalues) {
  Columns s(p);
  I total = s.row.size(), padded = round_up(total, W), rows = 0, parts = p.parts(T);
  for (I g = 0; g < p.count; ++g) rows += p.outs[g];
  Space sum_space;
  float* all = sum_space.zeros(parts * padded);
  parallel(parts, p.threads, [&](I part) {
    float *tile = tile_space.get(rows * T), *sum = all + part * padded;
    alignas(64) float x[P * T], panel[P * T];
    V open[W] = {};  // the last W products grad * x, whose lanes are still to be summed
    each_tile(p, T, part, parts, [&](I n0, I m) {
      for (I g = 0, first = 0; g < p.count; first += p.outs[g++])
        for (I r = 0; r < p.outs[g]; r += P)
          read_panel<T>(grads[g] + n0 * p.outs[g], m, p.outs[g], r, tile + (first + r) * T);
      for (I c0 = 0; c0 < p.in; c0 += P) {
        read_panel<T>(p.x + n0 * p.in, m, p.in, c0, x);
        for (I c = c0; c < std::min(c0 + P, p.in); ++c) {
          V acc[T / W] = {}, xs[T / W];
          UNROLL for (int u = 0; u < T / W; ++u) xs[u] = *(const V*)(x + (c - c0) * T + u * W);
          for (I k = s.start[c]; k < s.start[c + 1]; ++k) {
            const float* grad = tile + (I)s.row[k] * T;
            V v = spread(s.value[k]), product = {};
            UNROLL for (int u = 0; u < T / W; ++u) {
              V g = *(const V*)(grad + u * W); keep(g);
              acc[u] += v * g, product += g * xs[u];
            }
            open[k & (W - 1)] = product;
            if ((k & (W - 1)) == W - 1) store(sum + k + 1 - W, load(sum + k + 1 - W) + sums(open));
          }
          UNROLL for (int u = 0; u < T / W; ++u) *(V*)(panel + (c - c0) * T + u * W) = acc[u];
        }
        write_panel<T>(panel, m, p.in, c0, dx + n0 * p.in);
      }
      if (total % W) {
        for (I k = total; k < padded; ++k) open[k % W] = V{};
        store(sum + padded - W, load(sum + padded - W) + sums(open));
      }
    });
  });
  std::vector<float> given(total);
  for (I k = 0; k < total; ++k) {
    float value = 0;
    for (I part = 0; part < parts; ++part) value += all[part * padded + k];
    given[s.from[k]] = value;
  }
  for (I g = 0, k = 0; g < p.count; k += p.num[g++]) std::copy_n(given.begin() + k, p.num[g], dvalues[g]);
}

// ---- Blocks. A panel is the columns of a block, in strips of S columns: (strips, BLOCK_T, S), zero-padded.

constexpr I S = 16, BLOCK_T = 64;
constexpr int Q = S / W, R = W == 16 ? 16 : 4;  // R x Q registers of sums

struct Blocks {  // the products that make up a matrix y, panel by panel
  I b, wide;                    // side, and rounded up to S
  std::vector<I> start;         // panel l of y takes blocks start[l] .. start[l + 1] - 1
  std::vector<I> source, from;  // the panel a block multiplies, its number in the given order
  const float* values;          // (blocks, strips, b, S)
};

void pack(const float* matrix, I m, I cols, I c0, I b, float* panel) {
  for (I strip = 0; strip < b; strip += S, c0 += S, panel += BLOCK_T * S) {
    I w = std::max<I>(0, std::min({S, b - strip, cols - c0}));
    for (I t = 0; t < m; ++t) {
      const float* from = matrix + t * cols + c0;
      float* to = panel + t * S;
      if (w == S) UNROLL for (int u = 0; u < S; u += W) store(to + u, load(from + u));
      else std::fill(std::copy_n(from, w, to), to + S, 0.f);
    }
    std::fill(panel + m * S, panel + round_up(m, S) * S, 0.f);
  }
}

// Panel l of y (m, cols): the sum of panels[source] (m, b) times values (b, b) over its blocks.
void multiply(const Blocks& k, I l, const float* panels, I m, float* y, I cols) {
  for (I strip = 0; strip < std::min(k.b, cols - l * k.b); strip += S) {
    I column = l * k.b + strip, w = std::min({S, k.b - strip, cols - column});
    for (I t = 0; t < m; t += R) {
      V acc[R][Q] = {};
      for (I i = k.start[l]; i < k.start[l + 1]; ++i)
        for (I c0 = 0; c0 < k.b; c0 += S) {
          const float *a = panels + (k.source[i] * k.wide + c0) * BLOCK_T + t * S;
          const float *v = k.values + (i * k.wide + strip) * k.b + c0 * S;
          for (I c = 0, end = std::min(S, k.b - c0); c < end; ++c) UNROLL for (int j = 0; j < R; ++j) {
            V f = spread(a[j * S + c]);
            UNROLL for (int q = 0; q < Q; ++q) acc[j][q] += f * load(v + c * S + q * W);
          }
        }
      float* to = y + t * cols + column;
      if (w == S && t + R <= m) {
        UNROLL for (int j = 0; j < R; ++j) UNROLL for (int q = 0; q < Q; ++q) store(to + j * cols + q * W, acc[j][q]);
      } else {
        float rest[R][S];
        memcpy(rest, acc, sizeof rest);
        for (I j = 0; j < std::min<I>(R, m - t); ++j) std::copy_n(rest[j], w, to + j * cols);
      }
    }
  }
}

// sum (wide, wide) += grad^T x for two panels of m rows
void multiply_transposed(const float* grad, const float* x, I m, I wide, float* sum) {
  for (I r = 0; r < wide; r += R)
    for (I strip = 0; strip < wide; strip += S) {
      const float *g = grad + r / S * S * BLOCK_T + r % S, *xs = x + strip * BLOCK_T;
      float* to = sum + r * wide + strip;
      V acc[R][Q];
      UNROLL for (int j = 0; j < R; ++j) UNROLL for (int q = 0; q < Q; ++q) acc[j][q] = load(to + j * wide + q * W);
      for (I t = 0; t < m; ++t) UNROLL for (int j = 0; j < R; ++j) {
        V f = spread(g[t * S + j]);
        UNROLL for (int q = 0; q < Q; ++q) acc[j][q] += f * load(xs + t * S + q * W);
      }
      UNROLL for (int j = 0; j < R; ++j) UNROLL for (int q = 0; q < Q; ++q) store(to + j * wide + q * W, acc[j][q]);
    }
}

// The part of block i of S_g inside the matrix to (strips, b, S), transposed or not.
void copy_block(const Problem& p, I g, I i, bool transposed, float* to) {
  I b = p.block, across = (p.in + b - 1) / b, place = p.places[g][i];
  I rows = std::min(b, p.outs[g] - place / across * b), columns = std::min(b, p.in - place % across * b);
  const float* from = p.values[g] + i * b * b;
  for (I r = 0; r < rows; ++r)
    for (I c = 0; c < columns; ++c) {
      I row = transposed ? c : r, column = transposed ? r : c;
      to[(column / S * b + row) * S + column % S] = from[r * b + c];
    }
}

void block_forward(const Problem& p, float* const* ys) {
  I b = p.block, wide = round_up(b, S), across = (p.in + b - 1) / b, size = BLOCK_T * wide, parts = p.parts(BLOCK_T);
  std::vector<Blocks> layers(p.count);
  std::vector<Space> spaces(p.count);
  for (I g = 0; g < p.count; ++g) {
    float* values = spaces[g].zeros(p.num[g] * b * wide);
    std::vector<I> start((p.outs[g] + b - 1) / b + 1), source(p.num[g]);
    for (I i = 0; i < p.num[g]; ++i) {
      ++start[p.places[g][i] / across + 1], source[i] = p.places[g][i] % across;
      copy_block(p, g, i, true, values + i * b * wide);
    }
    for (size_t l = 1; l < start.size(); ++l) start[l] += start[l - 1];
    layers[g] = {b, wide, start, source, {}, values};
  }
  parallel(parts, p.threads, [&](I part) {
    float* panels = tile_space.get(across * size);
    each_tile(p, BLOCK_T, part, parts, [&](I n0, I m) {
      for (I l = 0; l < across; ++l) pack(p.x + n0 * p.in, m, p.in, l * b, b, panels + l * size);
      for (I g = 0; g < p.count; ++g)
        for (I l = 0; l * b < p.outs[g]; ++l)
          multiply(layers[g], l, panels, m, ys[g] + n0 * p.outs[g], p.outs[g]);
    });
  });
}

// All S stacked on each other, blocks ordered by block column.
Blocks by_block_column(const Problem& p, Space& space) {
  I b = p.block, wide = round_up(b, S), across = (p.in + b - 1) / b, total = 0;
  for (I g = 0; g < p.count; ++g) total += p.num[g];
  float* values = space.zeros(total * b * wide);
  Blocks k{b, wide, std::vector<I>(across + 1), std::vector<I>(total), std::vector<I>(total), values};
  for (I g = 0; g < p.count; ++g)
    for (I i = 0; i < p.num[g]; ++i) ++k.start[p.places[g][i] % across + 1];
  for (I l = 0; l < across; ++l) k.start[l + 1] += k.start[l];
  std::vector<I> next(k.start);
  for (I g = 0, rows = 0, before = 0; g < p.count; ++g) {
    for (I i = 0; i < p.num[g]; ++i) {
      I to = next[p.places[g][i] % across]++;
      k.source[to] = rows + p.places[g][i] / across, k.from[to] = before + i;
      copy_block(p, g, i, false, values + to * b * wide);
    }
    rows += (p.outs[g] + b - 1) / b, before += p.num[g];
  }
  return k;
}

void block_backward(const Problem& p, const float* const* grads, float* dx, float* const* dvalues) {
  Space value_space, sum_space;
  Blocks k = by_block_column(p, value_space);
  I b = p.block, wide = k.wide, size = BLOCK_T * wide, area = wide * wide, total = k.source.size(), rows = 0;
  I parts = p.parts(BLOCK_T);
  for (I g = 0; g < p.count; ++g) rows += (p.outs[g] + b - 1) / b;
  float* all = sum_space.zeros(parts * total * area);
  parallel(parts, p.threads, [&](I part) {
    float *panels = tile_space.get((rows + 1) * size), *x = panels + rows * size, *sum = all + part * total * area;
    each_tile(p, BLOCK_T, part, parts, [&](I n0, I m) {
      float* to = panels;
      for (I g = 0; g < p.count; ++g)
        for (I r = 0; r < p.outs[g]; r += b, to += size) pack(grads[g] + n0 * p.outs[g], m, p.outs[g], r, b, to);
      for (I l = 0; l * b < p.in; ++l) {
        multiply(k, l, panels, m, dx + n0 * p.in, p.in);
        pack(p.x + n0 * p.in, m, p.in, l * b, b, x);
        for (I i = k.start[l]; i < k.start[l + 1]; ++i)
          multiply_transposed(panels + k.source[i] * size, x, m, wide, sum + i * area);
      }
    });
  });
  std::vector<float*> home;
  for (I g = 0; g < p.count; ++g)
    for (I i = 0; i < p.num[g]; ++i) home.push_back(dvalues[g] + i * b * b);
  for (I i = 0; i < total; ++i)
    for (I r = 0; r < b; ++r)
      for (I c = 0; c < b; ++c) {
        float value = 0;
        for (I part = 0; part < parts; ++part) value += all[(part * total + i) * area + r * wide + c];
        home[k.from[i]][r * b + c] = value;
      }
}

// 0, or 1 without memory, 2 if places are not sorted or not inside the matrix.
template <class F> int answer(const Problem& p, const F& work) {
  try {
    p.check();
    work();
    return 0;
  } catch (int code) { return code; } catch (...) { return 1; }
}
}  // namespace

#define PROBLEM \
  I block, I n, I in, I count, I threads, const float *x, const float *const *values, const int32_t *const *places, \
      const I *num, const I *outs
#define GIVEN Problem p{block, n, in, count, threads, x, values, places, num, outs}

extern "C" {
int sltrain_has_threads() { return has_threads(); }
int sltrain_sparse_forward(PROBLEM, float* const* ys) {
  GIVEN;
  return answer(p, [&] {
    I T = tile_tokens(p, in);
    (T == 64 ? sparse_forward<64> : T == 32 ? sparse_forward<32> : sparse_forward<16>)(p, ys);
  });
}
int sltrain_sparse_backward(PROBLEM, const float* const* grads, float* dx, float* const* dvalues) {
  GIVEN;
  return answer(p, [&] {
    I rows = 0;
    for (I g = 0; g < count; ++g) rows += outs[g];
    I T = tile_tokens(p, rows);
    (T == 64 ? sparse_backward<64> : T == 32 ? sparse_backward<32> : sparse_backward<16>)(p, grads, dx, dvalues);
  });
}
int sltrain_block_forward(PROBLEM, float* const* ys) {
  GIVEN;
  return answer(p, [&] { block_forward(p, ys); });
}
int sltrain_block_backward(PROBLEM, const float* const* grads, float* dx, float* const* dvalues) {
  GIVEN;
  return answer(p, [&] { block_backward(p, grads, dx, dvalues); });
}
}
