// What a decoding step on CPU spends its time in: products with weights, and attention of one query
// a row over the sampler's cache. Compiled by cpu_kernels.py, with HEAD, the size of a head, and
// GROUP, the query heads of one key-value head.

#include <math.h>
#include <stdint.h>
#include <string.h>

// WIDTH: floats of a vector register; ROWS: rows at once, whose sums shall stay in registers; and
// of dot products, M_SIDE rows times N_SIDE outputs.
#if defined __AVX512F__
enum { WIDTH = 16, ROWS = 8, M_SIDE = 4, N_SIDE = 6 };
#elif defined __AVX__
enum { WIDTH = 8, ROWS = 4, M_SIDE = 3, N_SIDE = 3 };
#else // NEON has 32 registers; x86 without AVX spills
enum { WIDTH = 4, ROWS = 8, M_SIDE = 4, N_SIDE = 6 };
#endif
// Keeps v in a register: else gcc reads it from memory for each product that it is in.
#if defined __x86_64__
#define HOLD(v) __asm__("" : "+v"(v))
#else
#define HOLD(v)
#endif
enum { VECTORS = 3, PANEL = VECTORS * WIDTH, BLOCK = 128 };
typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4)));

const int64_t panel_width = PANEL;

// x (rows <= ROWS, K) times one panel (K, PANEL), plus bias (PANEL,), into `columns` columns of y,
// whose rows have N.
static inline __attribute__((always_inline)) void
tile(const float *x, const float *panel, const float *bias, float *y, int64_t rows, int64_t columns,
     int64_t K, int64_t N, const float *next)
{
    vector sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        memcpy(sum[r], bias, sizeof sum[r]);
    for (int64_t k = 0; k < K; k++) {
        const vector *w = (const vector *)(panel + k * PANEL);
        __builtin_prefetch(next + k * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const float a = x[(r < rows ? r : 0) * K + k];
#pragma GCC unroll 3
            for (int c = 0; c < VECTORS; c++)
                sum[r][c] += a * w[c];
        }
    }
    for (int r = 0; r < rows; r++)
        memcpy(y + r * N, sum[r], columns * sizeof(float));
}

// y (M, N) = x (M, K) times a weight that stands in panels (N / PANEL rounded up, K, PANEL), plus
// bias, zero-padded.
void linear(const float *x, const float *panels, const float *bias, float *y, int64_t M, int64_t K,
            int64_t N)
{
    for (int64_t first = 0; first < M; first += BLOCK)
#pragma omp parallel for
        for (int64_t p = 0; p < (N + PANEL - 1) / PANEL; p++) {
            const int64_t end = first + BLOCK < M ? first + BLOCK : M, left = N - p * PANEL;
            const float *panel = panels + p * K * PANEL;
            for (int64_t r = first, pass = 0; r < end; r += ROWS, pass++) {
                // What the processor does not foresee: each of the first three passes fetches a
                // third of the next panel. Behind the last one this points beyond the weights,
                // which a prefetch may.
                const float *next = panel + (PANEL + pass % VECTORS * WIDTH) * K;
                const int64_t rows = end - r;
                float *out = y + r * N + p * PANEL;
                if (rows >= ROWS && left >= PANEL) // all sizes known: no branch in the inner loop
                    tile(x + r * K, panel, bias + p * PANEL, out, ROWS, PANEL, K, N, next);
                else
                    tile(x + r * K, panel, bias + p * PANEL, out, rows < ROWS ? rows : ROWS,
                         left < PANEL ? left : PANEL, K, N, next);
            }
        }
}

// x (rows <= M_SIDE, K) times as many rows of a weight (columns <= N_SIDE, K), plus bias, into y.
static inline __attribute__((always_inline)) void
dots(const float *x, const float *weight, const float *bias, float *y, int64_t rows,
     int64_t columns, int64_t K, int64_t N)
{
    vector sum[M_SIDE][N_SIDE];
    float part[M_SIDE][N_SIDE][WIDTH];
    int64_t k = 0;
#pragma GCC unroll 8
    for (int r = 0; r < M_SIDE; r++)
#pragma GCC unroll 8
        for (int c = 0; c < N_SIDE; c++)
            sum[r][c] = (vector){0};
    for (; k + WIDTH <= K; k += WIDTH) {
        vector w[N_SIDE];
#pragma GCC unroll 8
        for (int c = 0; c < N_SIDE; c++) {
            w[c] = *(const vector *)(weight + (c < columns ? c : 0) * K + k);
            HOLD(w[c]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < M_SIDE; r++) {
            vector a = *(const vector *)(x + (r < rows ? r : 0) * K + k);
            HOLD(a);
#pragma GCC unroll 8
            for (int c = 0; c < N_SIDE; c++)
                sum[r][c] += a * w[c];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < M_SIDE; r++) // only here the sums leave their registers
#pragma GCC unroll 8
        for (int c = 0; c < N_SIDE; c++)
            memcpy(part[r][c], &sum[r][c], sizeof part[r][c]);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            float total = bias[c];
            for (int i = 0; i < WIDTH; i++)
                total += part[r][c][i];
            for (int64_t j = k; j < K; j++)
                total += x[r * K + j] * weight[c * K + j];
            y[r * N + c] = total;
        }
}

// y (M, N) = x (M, K) times a weight (N, K) where it stands, plus bias (N,): no copy in panels.
void linear_in_place(const float *x, const float *weight, const float *bias, float *y, int64_t M,
                     int64_t K, int64_t N)
{
#pragma omp parallel for
    for (int64_t n = 0; n < N; n += N_SIDE)
        for (int64_t r = 0; r < M; r += M_SIDE) {
            const int64_t rows = M - r < M_SIDE ? M - r : M_SIDE;
            const int64_t columns = N - n < N_SIDE ? N - n : N_SIDE;
            const float *a = x + r * K, *w = weight + n * K, *b = bias + n;
            if (rows == M_SIDE && columns == N_SIDE)
                dots(a, w, b, y + r * N + n, M_SIDE, N_SIDE, K, N);
            else
                dots(a, w, b, y + r * N + n, rows, columns, K, N);
        }
}

// Each half of x (HEAD,) turned against the other, by the angles of its position.
static void rotate(float *y, const float *x, const float *cos, const float *sin)
{
    const int half = HEAD / 2;
    for (int d = 0; d < half; d++) {
        y[d] = x[d] * cos[d] - x[d + half] * sin[d];
        y[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
    }
}

// query (n, kv_heads * GROUP, HEAD), key and value (n, kv_heads, HEAD), each with a stride of its
// rows; cos and sin (n, HEAD); keys and values (n, kv_heads, capacity, HEAD) are the cache's rows,
// written at position (n,) and read up to it; scratch (n, kv_heads, GROUP, capacity);
// out (n, kv_heads * GROUP, HEAD).
void attend(const float *query, const float *key, const float *value, int64_t query_stride,
            int64_t key_stride, int64_t value_stride, const float *cos, const float *sin,
            const int64_t *position, float *keys, float *values, float *scratch, float *out,
            int64_t n, int64_t kv_heads, int64_t capacity, float scale)
{
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n * kv_heads; i++) {
        const int64_t row = i / kv_heads, head = i % kv_heads, last = position[row];
        float *k = keys + i * capacity * HEAD, *v = values + i * capacity * HEAD;
        float *weight = scratch + i * GROUP * capacity, q[GROUP][HEAD], sum[GROUP][HEAD] = {{0}};
        const float *c = cos + row * HEAD, *s = sin + row * HEAD;
        const float *queries = query + row * query_stride + head * GROUP * HEAD;

        rotate(k + last * HEAD, key + row * key_stride + head * HEAD, c, s);
        memcpy(v + last * HEAD, value + row * value_stride + head * HEAD, sizeof(float[HEAD]));
        for (int g = 0; g < GROUP; g++)
            rotate(q[g], queries + g * HEAD, c, s);

        for (int64_t j = 0; j <= last; j++)
            for (int g = 0; g < GROUP; g++) {
                float product = 0;
                for (int d = 0; d < HEAD; d++)
                    product += q[g][d] * k[j * HEAD + d];
                weight[g * capacity + j] = product * scale;
            }
        for (int g = 0; g < GROUP; g++) { // softmax
            float *w = weight + g * capacity, top = w[0], total = 0;
            for (int64_t j = 1; j <= last; j++)
                top = w[j] > top ? w[j] : top;
            for (int64_t j = 0; j <= last; j++)
                total += w[j] = expf(w[j] - top);
            for (int64_t j = 0; j <= last; j++)
                w[j] /= total;
        }
        for (int64_t j = 0; j <= last; j++)
            for (int g = 0; g < GROUP; g++)
                for (int d = 0; d < HEAD; d++)
                    sum[g][d] += weight[g * capacity + j] * v[j * HEAD + d];
        memcpy(out + i * GROUP * HEAD, sum, sizeof sum);
    }
}
