#pragma once

// As much of GLSL in C++ as the shaders' arithmetic needs

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>

typedef unsigned int uint;

#define precise
#define TRIT_INOUT(type) type &

template <typename T>
struct vector2 {
    T x, y;

    vector2() = default;
    explicit vector2(T all) : x(all), y(all) {}
    vector2(T x, T y) : x(x), y(y) {}
};

template <typename T>
struct vector4 {
    T x, y, z, w;

    vector4() = default;
    explicit vector4(T all) : x(all), y(all), z(all), w(all) {}
    vector4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
    vector4(vector2<T> a, vector2<T> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
    template <typename U>
    explicit vector4(vector4<U> v) : x((T) v.x), y((T) v.y), z((T) v.z), w((T) v.w) {}

    T   operator[](uint i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
    T & operator[](uint i)       { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
};

// scalar arguments are converted, as GLSL does
template <typename T> struct same_type { typedef T type; };

#define DEFINE_OPERATOR(op)                                                                                               \
    template <typename T> vector2<T> operator op(vector2<T> a, vector2<T> b) { return { a.x op b.x, a.y op b.y }; }       \
    template <typename T> vector2<T> operator op(vector2<T> a, typename same_type<T>::type b) { return a op vector2<T>(b); } \
    template <typename T> vector4<T> operator op(vector4<T> a, vector4<T> b) {                                            \
        return { a.x op b.x, a.y op b.y, a.z op b.z, a.w op b.w };                                                        \
    }                                                                                                                     \
    template <typename T> vector4<T> operator op(vector4<T> a, typename same_type<T>::type b) { return a op vector4<T>(b); } \
    template <typename T> vector4<T> operator op(typename same_type<T>::type a, vector4<T> b) { return vector4<T>(a) op b; }

DEFINE_OPERATOR(+)
DEFINE_OPERATOR(-)
DEFINE_OPERATOR(*)
DEFINE_OPERATOR(&)
DEFINE_OPERATOR(>>)

template <typename T> vector4<T> & operator+=(vector4<T> & a, vector4<T> b) { return a = a + b; }

typedef vector2<float> vec2;
typedef vector4<float> vec4;
typedef vector2<uint>  uvec2;
typedef vector4<uint>  uvec4;
typedef vector4<int>   ivec4;

static inline vec2 floor(vec2 v) { return { std::floor(v.x), std::floor(v.y) }; }
static inline vec4 floor(vec4 v) { return { std::floor(v.x), std::floor(v.y), std::floor(v.z), std::floor(v.w) }; }

static inline vec2 fma(vec2 a, vec2 b, vec2 c) { return { std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y) }; }
static inline vec4 fma(vec4 a, vec4 b, vec4 c) {
    return { std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y), std::fma(a.z, b.z, c.z), std::fma(a.w, b.w, c.w) };
}

static inline float dot(vec4 a, vec4 b) { return a.x*b.x + a.y*b.y + a.z*b.z + a.w*b.w; }

static inline uint min(uint a, uint b) { return a < b ? a : b; }

static inline float uintBitsToFloat(uint bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline uint floatBitsToUint(float x) {
    uint bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static inline int dotPacked4x8EXT(int a, int b) {
    int sum = 0;
    for (int i = 0; i < 4; ++i) {
        sum += (int8_t) (a >> 8*i) * (int8_t) (b >> 8*i);
    }
    return sum;
}
