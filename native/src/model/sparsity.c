#include "sparsity.h"

#include "../error.h"

#include <string.h>

enum { MAX_DIGITS = 15 }; // which a double holds, and so does the power of ten below them

// "0.95", "-1", "+2.5": digits and a point, whatever the locale. As strtod rounds it, since it is one division.
static bool read_decimal(const char * text, double * value) {
    const bool negative = *text == '-';
    text += *text == '-' || *text == '+';
    double digits = 0.0, power = 1.0;
    int n_digits = 0;
    bool has_point = false;
    for (; *text != '\0'; ++text) {
        if (*text == '.' && !has_point && n_digits > 0) {
            has_point = true;
        } else if (*text >= '0' && *text <= '9' && n_digits < MAX_DIGITS) {
            digits = 10.0 * digits + (*text - '0');
            power *= has_point ? 10.0 : 1.0;
            ++n_digits;
        } else {
            return false;
        }
    }
    *value = (negative ? -digits : digits) / power;
    return n_digits > 0;
}

static bool read_sparsity(const char * text, struct tsffn_sparsity * sparsity) {
    static const struct {
        const char * name;
        enum tsffn_sparsity_kind kind;
    } kinds[] = {
        {"predictor", TSFFN_SPARSITY_PREDICTOR},
        {"exact", TSFFN_SPARSITY_EXACT},
        {"dense", TSFFN_SPARSITY_DENSE},
        {"topk", TSFFN_SPARSITY_TOPK},
    };
    const size_t length = strcspn(text, ":");
    const bool has_value = text[length] == ':';
    for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); ++i) {
        if (strlen(kinds[i].name) == length && strncmp(text, kinds[i].name, length) == 0) {
            sparsity->kind = kinds[i].kind;
        }
    }
    switch (sparsity->kind) {
    case TSFFN_SPARSITY_PREDICTOR:
        return !has_value || read_decimal(text + length + 1, &sparsity->value);
    case TSFFN_SPARSITY_TOPK:
        return has_value && read_decimal(text + length + 1, &sparsity->value) && sparsity->value >= 0.0 &&
               sparsity->value < 1.0;
    case TSFFN_SPARSITY_EXACT:
    case TSFFN_SPARSITY_DENSE:
        return !has_value;
    case TSFFN_SPARSITY_DEFAULT:
        break;
    }
    return false;
}

bool tsffn_parse_sparsity(const char * name, const char * text, struct tsffn_sparsity * sparsity, char * error,
                          size_t error_size) {
    *sparsity = (struct tsffn_sparsity){.kind = TSFFN_SPARSITY_DEFAULT};
    if (text == NULL) {
        return true;
    }
    if (strlen(text) < sizeof(sparsity->text) && read_sparsity(text, sparsity)) {
        memcpy(sparsity->text, text, strlen(text) + 1);
        return true;
    }
    return tsffn_fail(error, error_size,
                      "%s: expected 'predictor', 'exact', 'dense', 'topk:S' with S from 0 to below 1, or 'predictor:D' "
                      "with a number D, found '%.40s'",
                      name, text);
}
