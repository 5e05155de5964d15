#if !defined(GGML_TRIT_TYPES_COMP)
#define GGML_TRIT_TYPES_COMP

// Blocks of TRIT1..TRIT4. ggml-trit.c is the reference of the format.

#if defined(DATA_A_TRIT1)
#define TRIT_DEPTH 1
#define TRIT_N_WORDS 8
#elif defined(DATA_A_TRIT2)
#define TRIT_DEPTH 2
#define TRIT_N_WORDS 14
#elif defined(DATA_A_TRIT3)
#define TRIT_DEPTH 3
#define TRIT_N_WORDS 21
#elif defined(DATA_A_TRIT4)
#define TRIT_DEPTH 4
#define TRIT_N_WORDS 27
#endif

#define QUANT_K_TRIT 64

#if defined(TRIT_DEPTH)
#define QUANT_K QUANT_K_TRIT
#define QUANT_R 1
#define A_TYPE uint16_t          // a word: TRIT_N_WORDS of them are a block
#define A_TYPE_PACKED32 uint32_t // two words, of whatever blocks
#define DATA_A_TRIT
#endif

#endif // !defined(GGML_TRIT_TYPES_COMP)
