// Products with weights of each format: right, and bit for bit the same however many rows and threads there
// are.

#include "products_kind.h"

#include "models.h"
#include "values.h"

#define LENGTH(array) ((int64_t)(sizeof(array) / sizeof *(array)))
enum { MOST_OF_X = 260 };  // more than pass together

static Tiny owner;  // of the calls

// What rounding may do to the product of x and of a weight's row: numbers of x are half a step of their group
// away, and sums are float32.
static double room_for_rounding(const offramp_weight *w, const double *row, const float *x, int whole) {
    const int64_t group = w->type == OFFRAMP_INT8 ? 64 : 32;
    double room = 1e-6;
    for (int64_t k = 0; k < w->columns; k += group) {
        double most = 0, weights = 0, top = 0, sizes = 0;
        for (int64_t c = k; c < k + group && c < w->columns; c++) {
            most = fmax(most, fabs(x[c])), sizes += fabs(x[c]);
            weights += fabs(row[c]), top = fmax(top, fabs(row[c]));
        }
        if (w->type >= OFFRAMP_INT8 && !whole) room += 0.5001 * most / (w->fine ? 32512 : 127) * weights;
        if (form_of(w) == PAIRS) room += most / 256 * weights;
        room += 4e-6 * top * sizes;
    }
    return room;
}

// Rows of random numbers; with `whole`, of integers that 8 bits, or with `fine` weights 16, hold as they are:
// some columns have the largest, and some groups have nothing but the largest, or the smallest.
static float *rows_for(const offramp_weight *w, int64_t R, int whole) {
    float *x = randoms(R * w->columns, -2, 2);
    const int64_t most = w->fine ? 127 * 255 + 127 : 127;
    for (int64_t i = 0; whole && i < R * w->columns; i++) {
        const int64_t column = i % w->columns, group = column / 32;
        x[i] = (float)(group % 3 == 1     ? (group % 2 ? most : -most)
                       : column % 32 == 5 ? most
                                          : below(2 * most + 1) - most);
    }
    return x;
}

static void product_is_right(const offramp_weight *w, int whole) {
    enum { R = 2 };
    const int64_t N = w->rows, K = w->columns;
    const float *x = rows_for(w, R, whole);
    float *y = zeros(R * N);
    double *row = memory(K * 8);
    WORKS(offramp_product(owner.model, w, x, R, y, &said));
    for (int64_t n = 0; n < N; n++) {
        for (int64_t k = 0; k < K; k++) row[k] = entry(w, n, k);
        for (int64_t r = 0; r < R; r++) {
            double wanted = bias_of(w, n);
            for (int64_t k = 0; k < K; k++) wanted += row[k] * x[r * K + k];
            CHECK(fabs(y[r * N + n] - wanted) <= room_for_rounding(w, row, x + r * K, whole),
                  "%g and not %g, in row %d of %d of type %d, fine %d, columns %d", y[r * N + n], wanted,
                  (int)n, (int)N, (int)w->type, (int)w->fine, (int)K);
        }
    }
}

static void values_are_right(const offramp_weight *w) {
    float *values = zeros(w->columns);
    for (int64_t n = 0; n < w->rows; n++) {
        values_of_row(w, n, values);
        for (int64_t k = 0; k < w->columns; k++) {
            const double wanted = entry(w, n, k);
            CHECK(fabs(values[k] - wanted) <= 1e-6 * fabs(wanted) + 1e-7, "%g and not %g, type %d", values[k],
                  wanted, (int)w->type);
        }
    }
}

// However many rows there are, and threads, each has the results that it has alone.
static void rows_are_their_own(const offramp_weight *w) {
    static const int64_t counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 23, MOST_OF_X};
    const int64_t N = w->rows, K = w->columns,
                  all = K > DEPTH ? 9
                        : K > 40  ? LENGTH(counts) - 1
                                  : LENGTH(counts);
    const int64_t most = counts[all - 1];
    float *x = rows_for(w, most, 0), *alone = zeros(most * N), *y = zeros(most * N);
    WORKS(offramp_model_threads(owner.model, 1, &said));
    for (int64_t r = 0; r < most; r++)
        WORKS(offramp_product(owner.model, w, x + r * K, 1, alone + r * N, &said));
    for (int threads = 1; threads <= 3; threads++) {
        WORKS(offramp_model_threads(owner.model, threads, &said));
        for (int64_t i = 0; i < all; i++) {
            memset(y, 255, counts[i] * N * 4);
            WORKS(offramp_product(owner.model, w, x, counts[i], y, &said));
            CHECK(same(y, alone, counts[i] * N), "%d rows of %d by %d, type %d, fine %d, threads %d",
                  (int)counts[i], (int)N, (int)K, (int)w->type, (int)w->fine, threads);
        }
    }
    WORKS(offramp_model_threads(owner.model, 1, &said));
}

// Scattered rows of a weight give what the whole gives, and nothing else is written. Some rows of a weight,
// or added to what is there: the same.
static void parts_are_those_of_the_whole(const offramp_weight *w) {
    const int64_t N = w->rows, K = w->columns, R = 2;
    float *x = rows_for(w, R, 0), *whole = zeros(R * N), *y = zeros(R * N), *room = zeros(narrow_room(R, K));
    int64_t *chosen = memory(N * 8), count = 0;
    WORKS(offramp_product(owner.model, w, x, R, whole, &said));
    Crew crew = {0};
    Hand hand = {&crew, 0, 0, 0, 1};
    const Rows rows = prepare(&hand, w, x, K, R, room);
    for (int64_t n = 0; n < N; n++)
        if (below(3)) chosen[count++] = n;
    for (int64_t r = 0; r < R; r++) multiply_chosen(w, &rows, r, chosen, count, (Out){y, N, 0});
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0, i = 0; n < N; n++) {
            const int wanted = i < count && chosen[i] == n;
            CHECK(y[r * N + n] == (wanted ? whole[r * N + n] : 0), "row %d of %d, type %d, fine %d", (int)n,
                  (int)N, (int)w->type, (int)w->fine);
            i += wanted;
        }
    const int64_t first = N / 3, last = N - N / 4;
    for (int add = 0; add < 2; add++) {
        for (int64_t i = 0; i < R * N; i++) y[i] = 7;
        multiply(&hand, w, rows, R, (Out){y, N, add}, first, last);
        for (int64_t i = 0; i < R * N; i++) {
            const float made = whole[i] + (add ? 7 : 0), wanted = i % N < first || i % N >= last ? 7 : made;
            // More columns than DEPTH are added in pieces.
            CHECK(fabsf(y[i] - wanted) <= (add && K > DEPTH ? 1e-5f : 0), "%g and not %g, type %d", y[i],
                  wanted, (int)w->type);
        }
    }
}

static void test_of(int type, int fine, const int64_t *columns, int64_t count) {
    static const int64_t rows[] = {1, 2, 3, 5, 16, 17, 31, 40, 130};
    for (int64_t k = 0; k < count; k++)
        for (int64_t n = 0; n < LENGTH(rows); n++) {
            if (columns[k] > DEPTH && (n % 3 == 0 || rows[n] > 100)) continue;  // they take long
            const int mark = kept_count;
            const offramp_weight w = weight_of(type, fine, rows[n], columns[k], n % 2);
            product_is_right(&w, 0);
            values_are_right(&w);
            if (type >= OFFRAMP_INT8) product_is_right(&w, 1);
            if (n % 2 || columns[k] < 100) rows_are_their_own(&w);
            parts_are_those_of_the_whole(&w);
            free_from(mark);
        }
}

// A NaN is found again in its own row, and only there; what is too small for a scale is not lost.
static void nan_is_kept(int type, int fine) {
    const offramp_weight w = weight_of(type, fine, 20, 256, 0);
    float *x = rows_for(&w, 3, 0), *y = zeros(60);
    x[256 + 10] = NAN;
    WORKS(offramp_product(owner.model, &w, x, 3, y, &said));
    for (int n = 0; n < 20; n++)
        CHECK(!isnan(y[n]) && isnan(y[20 + n]) && !isnan(y[40 + n]), "type %d, fine %d", type, fine);
    memset(x, 0, 256 * 4);
    WORKS(offramp_product(owner.model, &w, x, 1, y, &said));
    for (int n = 0; n < 20; n++) CHECK(y[n] == 0, "zeros give %g, type %d, fine %d", y[n], type, fine);
}

// Weights of several types above one another: each gives what it gives alone, in any part of the whole.
static void stacked_weights_are_their_pieces(void) {
    static const int types[][3] = {{OFFRAMP_Q5_0, OFFRAMP_Q5_0, OFFRAMP_Q8_0},
                                   {OFFRAMP_Q4_K, OFFRAMP_Q6_K, OFFRAMP_BFLOAT16},
                                   {OFFRAMP_FLOAT32, OFFRAMP_BFLOAT16, OFFRAMP_FLOAT16},
                                   {OFFRAMP_FLOAT16, OFFRAMP_IQ4_NL, OFFRAMP_FLOAT32}};
    for (int64_t i = 0; i < LENGTH(types); i++)
        for (int fine = 0; fine < 2; fine++) {
            static const int64_t rows[] = {48, 7, 21};
            offramp_weight pieces[3], w = {.type = OFFRAMP_STACKED, .fine = fine, .rows = 76, .columns = 256};
            w.values = pieces, w.pieces = 3;
            for (int p = 0; p < 3; p++) pieces[p] = weight_of(types[i][p], fine, rows[p], 256, p == 1);
            values_are_right(&w);
            rows_are_their_own(&w);
            parts_are_those_of_the_whole(&w);
            const float *x = randoms(2 * 256, -2, 2);
            float *y = zeros(2 * 76), *alone = zeros(2 * 48);
            WORKS(offramp_product(owner.model, &w, x, 2, y, &said));
            for (int p = 0, first = 0; p < 3; first += (int)rows[p++]) {
                pieces[p].fine |=
                    pieces[p].type == OFFRAMP_BFLOAT16;  // among others, its rows are not rounded
                WORKS(offramp_product(owner.model, pieces + p, x, 2, alone, &said));
                for (int r = 0; r < 2; r++)
                    CHECK(same(y + r * 76 + first, alone + r * rows[p], rows[p]), "piece %d of %d, fine %d",
                          p, (int)i, fine);
            }
        }
}

static void wrong_weights_are_refused(void) {
    offramp_weight w = weight_of(OFFRAMP_INT8, 0, 4, 64, 0);
    float x[64] = {0}, y[4] = {1, 2, 3, 4};
    const float before[4] = {1, 2, 3, 4};
    offramp_weight wrong[14], pieces[2] = {w, w};
    for (int i = 0; i < 14; i++) wrong[i] = w;
    for (int i = 8; i < 13; i++)
        wrong[i].type = OFFRAMP_STACKED, wrong[i].values = pieces, wrong[i].pieces = 2;
    pieces[0].type = pieces[1].type = OFFRAMP_Q5_0, pieces[0].rows = 3;
    wrong[8].rows = 8, wrong[9].pieces = 0, wrong[10].columns = 32, wrong[11].type = OFFRAMP_Q6_K,
    wrong[12].rows = 7, pieces[1].type = OFFRAMP_INT8;
    wrong[0].type = OFFRAMP_INT64, wrong[1].type = -1, wrong[2].columns = 40, wrong[3].rows = 0,
    wrong[4].scales = NULL;
    wrong[13].pieces = 1;
    wrong[5].values = NULL, wrong[6].columns = -32, wrong[7].rows = INT64_MAX;
    for (int i = 0; i < 14; i++) {
        REFUSED(offramp_product(owner.model, wrong + i, x, 1, y, &said));
        CHECK(offramp_product(owner.model, wrong + i, x, 1, y, NULL) == OFFRAMP_INVALID,
              "without an error's place: %d", i);
    }
    REFUSED(offramp_product(owner.model, &w, x, -1, y, &said));
    WORKS(offramp_product(owner.model, &w, x, 0, y, &said));
    CHECK(same(y, before, 4), "a refused product was written");
}

int main(void) {
    some_largest = 1;
    static const int64_t whole_groups[] = {32, 64, 96, 160, DEPTH + 32, 2 * DEPTH + 96};
    static const int64_t super_groups[] = {256, 512, DEPTH + 256};
    static const int64_t odd[] = {1, 7, 8, 15, 17, 40, 63, 65, DEPTH + 9};
    Shape shape = SMALL;
    shape.blocks = "";
    owner = tiny(shape);
    for (int type = OFFRAMP_FLOAT32; type < OFFRAMP_STACKED; type++)
        for (int fine = 0; fine < 2; fine++) {
            const int super = type >= OFFRAMP_Q4_0 && LAYOUTS[type].super;
            nan_is_kept(type, fine);
            if (type < OFFRAMP_INT8) test_of(type, fine, odd, LENGTH(odd));
            if (super)
                test_of(type, fine, super_groups, LENGTH(super_groups));
            else
                test_of(type, fine, whole_groups, LENGTH(whole_groups));
        }
    stacked_weights_are_their_pieces();
    wrong_weights_are_refused();
    offramp_model_free(owner.model);
    return 0;
}
