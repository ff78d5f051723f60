#include "products_kind.h"

static const Products *const PRODUCTS_OF[KINDS] = {&products_float32,   &products_bfloat16,
                                                   &products_int8,      &products_int4,
                                                   &products_fine_int8, &products_fine_int4};

static const Products *products_of(const Weight *m) { return PRODUCTS_OF[kind_of(m)]; }

int64_t unit_of(const Weight *m) { return m->type == OFFRAMP_INT4 ? PANEL : FOUR; }

// Bytes to prefetch into the cache.
typedef struct {
    const char *from, *to;
} Next;

// Multiplies R rows of x with rows `from` to `to` - 1 of the weight, over the columns `first` to `last` - 1.
// The weights stay in the cache for all rows. Meanwhile `next` is fetched.
static void multiply_cached(const Weight *m, const Rows *x, int64_t R, int64_t first, int64_t last,
                            const Out *out, int64_t from, int64_t to, Next next) {
    const Products *with = products_of(m);
    const int64_t several = with->weights, most = with->rows;
    const int64_t share = (next.to - next.from) / (((to - from) / several + 1) * (R / most + 1)) + 64;
    for (int64_t r = 0, T; r < R; r += T) {
        T = min_(R - r, most);
        for (int64_t n = from, N; n < to; n += N) {
            N = to - n >= several ? several : 1;
            (T == most && N > 1 ? with->cached : with->one_stream[T - 1])(
                &(Tile){m, x, n, N, 0, r, first, last, 0, 0}, out);
            for (const char *stop = next.from + share; next.from < stop && next.from < next.to;
                 next.from += 64)
                __builtin_prefetch(next.from);
        }
    }
}

// For few rows: each weight is read once, and in order.
static void product_of_few(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to,
                           int64_t apart) {
    const int64_t K = m->columns;
    const Products *with = products_of(m);
    Multiply *multiply_rows = (apart ? with->two_streams : with->one_stream)[R - 1];
    for (int64_t first = 0; first < K; first += DEPTH, out.add = 1)
        for (int64_t n = from; n < to; n += FOUR)
            multiply_rows(&(Tile){m, x, n, min_(to - n, FOUR), apart, 0, first, min_(K, first + DEPTH), 0, 0},
                          &out);
}

// For many rows: weights are cut into pieces that stay in the cache for all rows.
static void product_of_many(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to) {
    const int64_t K = m->columns, bytes = row_bytes(m) / K;
    for (int64_t first = 0; first < K; first += DEPTH, out.add = 1) {
        const int64_t last = min_(K, first + DEPTH), piece = CACHED / (bytes * (last - first)) / 4 * 4;
        for (int64_t n = from; n < to; n += piece) {
            const int64_t end = min_(to, n + piece);
            const char *weights = (const char *)m->values + end * K * bytes;
            const Next next = {weights, weights + (K <= DEPTH ? min_(to - end, piece) * K * bytes : 0)};
            multiply_cached(m, x, R, first, last, &out, n, end, next);
        }
    }
}

// For int4 weights: a panel stays in the cache for all rows.
static void product_of_panels(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to) {
    const int64_t K = m->columns;
    const Products *with = products_of(m);
    for (int64_t first = 0; first < K; first += DEPTH, out.add = 1)
        for (int64_t n = from / PANEL * PANEL; n < to; n += PANEL)
            for (int64_t r = 0, T; r < R; r += T) {
                T = min_(R - r, MOST_ROWS);
                with->one_stream[T - 1](
                    &(Tile){m, x, n, PANEL, 0, r, first, min_(K, first + DEPTH), from, to}, &out);
            }
}

void product(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to, int64_t apart) {
    const int panels = m->type == OFFRAMP_INT4;
    if (!panels && R <= MOST_ROWS) {
        product_of_few(m, x, R, out, from, to, apart);
        return;
    }
    (panels ? product_of_panels : product_of_many)(m, x, R, out, from, to);
    if (apart) product(m, x, R, out, from + apart, to + apart, 0);
}

void multiply(Hand *hand, const Weight *m, Rows x, int64_t R, Out out, int64_t first, int64_t last) {
    // Few rows of x are multiplied with two streams of weights that are far apart.
    const int64_t rows = last - first, apart = m->type != OFFRAMP_INT4 && R <= MOST_ROWS ? rows / 2 : 0;
    const Division d = divided(hand, apart ? apart : rows, unit_of(m));
    EACH_PIECE(i, hand, d.pieces) {
        int64_t from, to;
        part_of(&d, i, &from, &to);
        product(m, &x, R, out, first + from, first + to, apart);
        if (apart && to == d.total && rows % 2) product(m, &x, R, out, last - 1, last, 0);
    }
}

void multiply_chosen(const Weight *m, const Rows *x, int64_t r, const int64_t *chosen, int64_t count,
                     Out out) {
    products_of(m)->scattered(m, x, r, chosen, count, &out);
}

void rms_norm(const float *x, const float *weight, float eps, float *out, int64_t n) {
    const float factor = 1.0f / sqrtf(sum(dots(x, x, n)) / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

Rows prepare(Hand *hand, const Weight *m, const float *x, int64_t stride, int64_t R, float *room) {
    const Rows rows = rows_of(m, x, stride, R, room);
    if (narrows(kind_of(m))) EACH_PIECE(r, hand, R) make_narrow(m, &rows, r);
    return rows;
}

Rows prepare_normed(Hand *hand, const Weight *m, const float *h, const float *weight, float eps, int64_t R,
                    float *x, float *room) {
    const int64_t K = m->columns;
    const Rows rows = rows_of(m, x, K, R, room);
    EACH_PIECE(r, hand, R) {
        rms_norm(h + r * K, weight, eps, x + r * K, K);
        if (narrows(kind_of(m))) make_narrow(m, &rows, r);
    }
    return rows;
}
