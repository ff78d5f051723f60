#include "layouts.h"
#include "products_kind.h"

// The functions that multiply such weights with rows of this form.
static const Products *products_of(const Weight *m, Form form) {
    static const Products *const in_panels[] = {[2] = products_2_bits, [3] = products_3_bits,
                                                [4] = products_4_bits, [5] = products_5_bits,
                                                [6] = products_6_bits, [8] = products_8_bits};
    const int fine = form == FINE_BYTES || form == FINE_GROUPS;
    switch (m->type) {
        case OFFRAMP_FLOAT32: return &products_float32;
        case OFFRAMP_FLOAT16: return &products_float16;
#if MULTIPLIES_BFLOAT16
        case OFFRAMP_BFLOAT16: return form == PAIRS ? &products_paired_bfloat16 : &products_bfloat16;
#else
        case OFFRAMP_BFLOAT16: return &products_bfloat16;
#endif
        case OFFRAMP_INT8: return fine ? &products_fine_int8 : &products_int8;
    }
    const Layout of = LAYOUTS[m->type < OFFRAMP_STACKED ? m->type : OFFRAMP_FLOAT32];
    return (of.codes ? products_codes : in_panels[of.bits]) + fine;
}

int64_t unit_of(const Weight *m) { return in_panels(m) || m->type == OFFRAMP_STACKED ? PANEL : FOUR; }

void store_lanes(const Tile *c, const Out *out, int T, int64_t n, const vf *sums) {
    const int64_t first = c->first - n, last = c->last - n;
    const float *bias = c->m->bias && !c->from ? c->m->bias + n : NULL;
    float *y = out->y + c->r * out->stride + n;
    for (int t = 0; t < T; t++, y += out->stride) {
        if (first <= 0 && last >= LANES) {
            const vf s = bias ? sums[t] + load(bias) : sums[t];
            store(y, out->add ? load(y) + s : s);
            continue;
        }
        for (int64_t i = first < 0 ? 0 : first; i < min_(last, LANES); i++) {
            const float s = bias ? sums[t][i] + bias[i] : sums[t][i];
            y[i] = out->add ? y[i] + s : s;
        }
    }
}

// Bytes to prefetch into the cache.
typedef struct {
    const char *from, *to;
} Next;

// Multiplies R rows of x with rows `from` to `to` - 1 of the weight, over the columns `first` to `last` - 1.
// The weights stay in the cache for all rows. Meanwhile `next` is fetched.
static void multiply_cached(const Weight *m, const Rows *x, int64_t R, int64_t first, int64_t last,
                            const Out *out, int64_t from, int64_t to, Next next) {
    const Products *with = products_of(m, x->form);
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

// For few rows: each weight is read once, and in order. Beyond MOST_ROWS, the rows are multiplied in parts of
// about the same size, while the weights are still in the cache.
static void product_of_few(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to,
                           int64_t apart) {
    const int64_t K = m->columns, parts = (R + MOST_ROWS - 1) / MOST_ROWS, most = (R + parts - 1) / parts;
    const Products *with = products_of(m, x->form);
    Multiply *const *multiply_rows = apart ? with->two_streams : with->one_stream;
    for (int64_t first = 0; first < K; first += DEPTH, out.add = 1)
        for (int64_t n = from; n < to; n += FOUR)
            for (int64_t r = 0, T; r < R; r += T) {
                T = min_(R - r, most);
                multiply_rows[T - 1](
                    &(Tile){m, x, n, min_(to - n, FOUR), apart, r, first, min_(K, first + DEPTH), 0, 0},
                    &out);
            }
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

// For weights in panels: a panel stays in the cache for all rows.
static void product_of_panels(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to) {
    const int64_t K = m->columns;
    const Products *with = products_of(m, x->form);
    for (int64_t first = 0; first < K; first += DEPTH, out.add = 1)
        for (int64_t n = from / PANEL * PANEL; n < to; n += PANEL)
            for (int64_t r = 0, T; r < R; r += T) {
                T = min_(R - r, MOST_ROWS);
                with->one_stream[T - 1](
                    &(Tile){m, x, n, PANEL, 0, r, first, min_(K, first + DEPTH), from, to}, &out);
            }
}

// For stacked weights: the rows that each piece has of those.
static void product_of_pieces(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to) {
    const Weight *piece = m->values;
    for (int64_t i = 0; i < m->pieces && to > 0; i++, piece++) {
        if (from < piece->rows) product(piece, x, R, out, from > 0 ? from : 0, min_(to, piece->rows), 0);
        from -= piece->rows, to -= piece->rows, out.y += piece->rows;
    }
}

void product(const Weight *m, const Rows *x, int64_t R, Out out, int64_t from, int64_t to, int64_t apart) {
    const int stacked = m->type == OFFRAMP_STACKED, panels = in_panels(m);
    if (!stacked && !panels && R <= FEW_ROWS) {
        product_of_few(m, x, R, out, from, to, apart);
        return;
    }
    (stacked ? product_of_pieces : panels ? product_of_panels : product_of_many)(m, x, R, out, from, to);
    if (apart) product(m, x, R, out, from + apart, to + apart, 0);
}

void multiply(Hand *hand, const Weight *m, Rows x, int64_t R, Out out, int64_t first, int64_t last) {
    // Few rows of x are multiplied with two streams of weights that are far apart.
    const int64_t rows = last - first, unit = unit_of(m),
                  apart = unit != PANEL && R <= FEW_ROWS ? rows / 2 : 0;
    const Division d = divided(hand, apart ? apart : rows, unit);
    EACH_PIECE(i, hand, d.pieces) {
        int64_t from, to;
        part_of(&d, i, &from, &to);
        product(m, &x, R, out, first + from, first + to, apart);
        if (apart && to == d.total && rows % 2) product(m, &x, R, out, last - 1, last, 0);
    }
}

void multiply_chosen(const Weight *m, const Rows *x, int64_t r, const int64_t *chosen, int64_t count,
                     Out out) {
    if (m->type != OFFRAMP_STACKED) {
        products_of(m, x->form)->scattered(m, x, r, chosen, count, &out);
        return;
    }
    // Their places are given for the whole weight.
    int64_t own[64];
    const Weight *piece = m->values;
    for (int64_t i = 0, first = 0, n; i < count; i += n) {
        for (; chosen[i] >= first + piece->rows; piece++) first += piece->rows;
        for (n = 0; i + n < count && n < 64 && chosen[i + n] < first + piece->rows; n++)
            own[n] = chosen[i + n] - first;
        multiply_chosen(piece, x, r, own, n, (Out){out.y + first, out.stride, out.add});
    }
}

void rms_norm(const float *x, const float *weight, float eps, float *out, int64_t n) {
    const float factor = 1.0f / sqrtf(sum(dots(x, x, n)) / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

Rows prepare(Hand *hand, const Weight *m, const float *x, int64_t stride, int64_t R, float *room) {
    const Rows rows = rows_of(m, x, stride, R, room);
    if (rows.form != SINGLES) EACH_PIECE(r, hand, R) make_narrow(&rows, r);
    return rows;
}

Rows prepare_normed(Hand *hand, const Weight *m, const float *h, const float *weight, float eps, int64_t R,
                    float *x, float *room) {
    const int64_t K = m->columns;
    const Rows rows = rows_of(m, x, K, R, room);
    EACH_PIECE(r, hand, R) {
        rms_norm(h + r * K, weight, eps, x + r * K, K);
        make_narrow(&rows, r);
    }
    return rows;
}
