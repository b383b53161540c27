#include "report.h"

#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>

const char * const format_names[N_FORMATS] = {"f32", "f16", "bf16", "q8_0", "q4_0", "q3_nl"};

// The processor's name as the operating system gives it, or its architecture.
static const char * cpu_name(void) {
    static char name[128];
    static struct utsname system;
    FILE * file = fopen("/proc/cpuinfo", "r");
    char line[512];
    while (file != NULL && fgets(line, sizeof(line), file) != NULL &&
           sscanf(line, "model name : %127[^\n\"\\]", name) != 1) {
    }
    if (file != NULL) {
        fclose(file);
    }
    return *name != '\0' ? name : uname(&system) == 0 ? system.machine : "";
}

static double gb_per_s(const struct result * r) {
    return r->bytes_per_row / r->ns_per_product;
}

// Whether a and b stand in the same line of their table: everything but the column is equal.
static bool same_line(const struct result * a, const struct result * b) {
    return a->pattern == b->pattern && a->format == b->format && a->n_threads == b->n_threads &&
           strcmp(a->kernel, b->kernel) == 0 && (a->pattern != SPARSE || strcmp(a->isa, b->isa) == 0);
}

// One line per kernel, type, ... and one column per key; all results of a pattern.
static void table(const struct report * report, enum pattern pattern, const char * const * keys, int n_keys,
                  bool (*is_in)(const struct result *, const char * key), double (*value)(const struct result *)) {
    printf("| type | kernel |%s", pattern == CACHED ? "" : " threads |");
    for (int k = 0; k < n_keys; ++k) {
        printf(" %s |", keys[k]);
    }
    printf("\n|---|---|%s", pattern == CACHED ? "" : "---:|");
    for (int k = 0; k < n_keys; ++k) {
        printf("---:|");
    }
    printf("\n");
    for (int i = 0; i < report->n_results; ++i) {
        const struct result * first = &report->results[i];
        bool is_first = first->pattern == pattern;
        for (int j = 0; j < i && is_first; ++j) {
            is_first = !same_line(first, &report->results[j]);
        }
        if (!is_first) {
            continue;
        }
        printf("| %s | %s%s%s |", format_names[first->format], first->kernel,
               pattern == SPARSE && *first->isa != '\0' ? " " : "", pattern == SPARSE ? first->isa : "");
        if (pattern != CACHED) {
            printf(" %d |", first->n_threads);
        }
        for (int k = 0; k < n_keys; ++k) {
            const struct result * found = NULL;
            for (int j = i; j < report->n_results && found == NULL; ++j) {
                const struct result * r = &report->results[j];
                found = same_line(first, r) && is_in(r, keys[k]) ? r : NULL;
            }
            if (found == NULL) {
                printf(" |");
            } else if (value(found) >= 99.95) {
                printf(" %.0f |", value(found));
            } else {
                printf(" %.1f |", value(found));
            }
        }
        printf("\n");
    }
}

static const char NO_KERNEL[] = "no kernel";

static bool of_isa(const struct result * r, const char * key) {
    return strcmp(r->isa, key) == 0 || (*r->isa == '\0' && strcmp(key, NO_KERNEL) == 0);
}

static bool of_fraction(const struct result * r, const char * key) {
    double percent;
    return sscanf(key, "%lf", &percent) == 1 && r->fraction * 100.0 > percent - 0.01 &&
           r->fraction * 100.0 < percent + 0.01;
}

static double ns(const struct result * r) {
    return r->ns_per_product;
}

void print_markdown(const struct report * report) {
    enum { MAX_FRACTIONS = 16 };
    const char * isas[1 + TSFFN_ISA_COUNT];
    char percents[MAX_FRACTIONS][16];
    const char * fractions[MAX_FRACTIONS];
    int n_isas = 0, n_fractions = 0;
    isas[n_isas++] = NO_KERNEL;
    for (int isa = 0; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        bool is_used = false;
        for (int i = 0; kernels != NULL && i < report->n_results; ++i) {
            is_used = is_used || strcmp(report->results[i].isa, kernels->name) == 0;
        }
        if (is_used) {
            isas[n_isas++] = kernels->name;
        }
    }
    for (int i = 0; i < report->n_results; ++i) {
        const struct result * r = &report->results[i];
        bool is_new = r->pattern == SPARSE && n_fractions < MAX_FRACTIONS;
        for (int k = 0; k < n_fractions; ++k) {
            is_new = is_new && !of_fraction(r, fractions[k]);
        }
        if (is_new) {
            snprintf(percents[n_fractions], sizeof(percents[0]), "%.4g %%", r->fraction * 100.0);
            fractions[n_fractions] = percents[n_fractions];
            ++n_fractions;
        }
    }

    printf("%s; matrices of %d rows of %d weights, %.2f GiB\n", cpu_name(), (int)report->n_rows, (int)report->n_cols,
           (double)report->bytes / (double)(1 << 30));
    printf("Blank: not measured, or the function of a tier to the left (above, in the last table).\n");
    printf("\nRows in cache, one thread: ns per row and vector\n\n");
    table(report, CACHED, isas + 1, n_isas - 1, of_isa, ns);
    printf("\nAll rows in order, from memory: GB/s\n\n");
    table(report, IN_ORDER, isas, n_isas, of_isa, gb_per_s);
    printf("\nA fraction of the rows, from memory: GB/s\n\n");
    table(report, SPARSE, fractions, n_fractions, of_fraction, gb_per_s);
}

void print_json(const struct report * report) {
    static const char * const pattern_names[] = {[CACHED] = "cached", [IN_ORDER] = "in_order", [SPARSE] = "sparse"};
    printf("{\"cpu\": \"%s\", \"n_rows\": %lld, \"n_cols\": %lld, \"bytes\": %zu, \"results\": [", cpu_name(),
           (long long)report->n_rows, (long long)report->n_cols, report->bytes);
    for (int i = 0; i < report->n_results; ++i) {
        const struct result * r = &report->results[i];
        printf("%s\n  {\"pattern\": \"%s\", \"type\": \"%s\", \"kernel\": \"%s\", ", i > 0 ? "," : "",
               pattern_names[r->pattern], format_names[r->format], r->kernel);
        if (*r->isa != '\0') {
            printf("\"isa\": \"%s\", ", r->isa);
        } else {
            printf("\"isa\": null, ");
        }
        printf("\"threads\": %d, \"fraction\": %.6g, \"ns_per_product\": %.6g, \"gb_per_s\": %.6g}", r->n_threads,
               r->fraction, r->ns_per_product, gb_per_s(r));
    }
    printf("\n]}\n");
}
