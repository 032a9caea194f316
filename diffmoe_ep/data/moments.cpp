// From a stored sample's bytes on disk to the latent that the model trains on: read, compared with its checksum, sampled, scaled.
//
// It computes what `sample.final_latent` computes, to the bit: one rounded operation after the other, and the exponential by a table that
// NumPy made. Built at first use (`native.py`) and called without Python's lock. For x86 with AVX2; elsewhere NumPy does the work.

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define HERE __attribute__((target("avx2,f16c,pclmul,sse4.1")))

// What all samples of a dataset share; `native.py` has the same fields.
struct Facts {
    const uint8_t *header;   // of the array's npy file
    uint64_t header_size;
    uint64_t count, flips;   // values of a latent, C H W; orientations that are stored
    const float *deviation;  // of the posterior, by the bits of the float16 that is stored of it; 65,536
    float scale, shift;
    int64_t classes;         // labels are below
    uint8_t *bytes;          // room for a sample
    int64_t room;
};

// Of a member of the tar: where its content lies in the file, and its checksum.
struct Member {
    int64_t offset, size, crc32;
};

// A sample that is wanted; `native.py` lays out the same numbers.
struct Request {
    const Facts *facts;
    int64_t file, mirrored;  // descriptor; whether the mirrored moments are taken, if such are stored
    int64_t begin, length;   // what is read, members and all between them
    Member label, array;
};

namespace {

// crc32 of the polynomial 0x04C11DB7, reflected, as zlib's, by carry-less products: V. Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ Instruction" (Intel, 2009). Lanes of 16 bytes are folded over those that follow, then into one; what is left
// of 16 bytes is done byte by byte.

// x^n modulo the polynomial, reflected: what a lane is multiplied with to be moved over n bits.
constexpr uint64_t over(unsigned n) {
    uint32_t rest = 1, reflected = 0;
    for (unsigned i = 0; i < n; ++i) rest = (rest << 1) ^ ((rest >> 31) ? 0x04C11DB7u : 0u);
    for (int bit = 0; bit < 32; ++bit) reflected |= ((rest >> bit) & 1) << (31 - bit);
    return static_cast<uint64_t>(reflected) << 1;
}
constexpr uint64_t POLYNOMIAL = 0x1db710641, INVERSE = 0x1f7011641;  // of Barrett's reduction

struct Bytewise {
    uint32_t of[256];
    constexpr Bytewise() : of() {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            uint32_t rest = byte;
            for (int bit = 0; bit < 8; ++bit) rest = (rest >> 1) ^ ((rest & 1) ? 0xEDB88320u : 0u);
            of[byte] = rest;
        }
    }
};
constexpr Bytewise BYTEWISE;

HERE inline __m128i load(const uint8_t *bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes)); }

HERE inline __m128i folded(__m128i lane, __m128i by, __m128i next) {
    const __m128i low = _mm_clmulepi64_si128(lane, by, 0x00), high = _mm_clmulepi64_si128(lane, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

template <unsigned BYTES> HERE inline __m128i moving() {
    constexpr uint64_t low = over(8 * BYTES + 32), high = over(8 * BYTES - 32);
    return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
}

// The 16 bytes that are left of a sum and of what follows it.
HERE inline __m128i summed(__m128i sum, const uint8_t *&bytes, size_t &size) {
    const __m128i over_16 = moving<16>();
    for (; size >= 16; bytes += 16, size -= 16) sum = folded(sum, over_16, load(bytes));
    return sum;
}

// At least 64 bytes.
HERE __m128i by_64(const uint8_t *&bytes, size_t &size, uint32_t start) {
    const __m128i over_64 = moving<64>(), over_16 = moving<16>();
    __m128i lane[4];
    for (int i = 0; i < 4; ++i) lane[i] = load(bytes + 16 * i);
    lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128(static_cast<int>(start)));
    for (bytes += 64, size -= 64; size >= 64; bytes += 64, size -= 64)
        for (int i = 0; i < 4; ++i) lane[i] = folded(lane[i], over_64, load(bytes + 16 * i));
    for (int i = 1; i < 4; ++i) lane[i] = folded(lane[i - 1], over_16, lane[i]);
    return lane[3];
}

#define WIDE __attribute__((target("avx512f,vpclmulqdq,avx2,pclmul,sse4.1")))

WIDE inline __m512i folded(__m512i lanes, __m512i by, __m512i next) {
    const __m512i low = _mm512_clmulepi64_epi128(lanes, by, 0x00), high = _mm512_clmulepi64_epi128(lanes, by, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96);
}

// At least 256 bytes, 16 lanes at a time.
WIDE __m128i by_256(const uint8_t *&bytes, size_t &size, uint32_t start) {
    const __m512i over_256 = _mm512_broadcast_i32x4(moving<256>()), over_64 = _mm512_broadcast_i32x4(moving<64>());
    __m512i lanes[4];
    for (int i = 0; i < 4; ++i) lanes[i] = _mm512_loadu_si512(bytes + 64 * i);
    lanes[0] = _mm512_xor_si512(lanes[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(start))));
    for (bytes += 256, size -= 256; size >= 256; bytes += 256, size -= 256)
        for (int i = 0; i < 4; ++i) lanes[i] = folded(lanes[i], over_256, _mm512_loadu_si512(bytes + 64 * i));
    for (int i = 1; i < 4; ++i) lanes[i] = folded(lanes[i - 1], over_64, lanes[i]);
    const __m128i over_16 = moving<16>();
    __m128i sum = _mm512_extracti32x4_epi32(lanes[3], 0);
    sum = folded(sum, over_16, _mm512_extracti32x4_epi32(lanes[3], 1));
    sum = folded(sum, over_16, _mm512_extracti32x4_epi32(lanes[3], 2));
    return folded(sum, over_16, _mm512_extracti32x4_epi32(lanes[3], 3));
}

HERE uint32_t crc32_of(const uint8_t *bytes, size_t size) {
    static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
    uint32_t rest = 0xFFFFFFFFu;
    if (size >= 64) {
        __m128i sum = wide && size >= 256 ? by_256(bytes, size, rest) : by_64(bytes, size, rest);
        sum = summed(sum, bytes, size);
        // 128 bits to 64, to 32 by Barrett's reduction.
        const __m128i low_half = _mm_set_epi32(0, -1, 0, -1), barrett = _mm_set_epi64x(INVERSE, POLYNOMIAL);
        sum = _mm_xor_si128(_mm_srli_si128(sum, 8), _mm_clmulepi64_si128(sum, moving<16>(), 0x10));
        constexpr uint64_t over_8 = over(64);
        const __m128i above = _mm_srli_si128(sum, 4), to_8 = _mm_set_epi64x(0, static_cast<long long>(over_8));
        sum = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(sum, low_half), to_8, 0x00), above);
        __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(sum, low_half), barrett, 0x10);
        quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_half), barrett, 0x00);
        rest = static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(sum, quotient), 1));
    }
    for (size_t i = 0; i < size; ++i) rest = (rest >> 8) ^ BYTEWISE.of[(rest ^ bytes[i]) & 0xFF];
    return ~rest;
}

HERE bool finite(const uint16_t *halves, size_t count) {
    const __m256i exponent = _mm256_set1_epi16(0x7C00);
    __m256i found = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(halves + i));
        found = _mm256_or_si256(found, _mm256_cmpeq_epi16(_mm256_and_si256(some, exponent), exponent));
    }
    bool bad = !_mm256_testz_si256(found, found);
    for (; i < count; ++i) bad |= (halves[i] & 0x7C00) == 0x7C00;
    return !bad;
}

}  // namespace

// The latent of one orientation's float16 moments (mean, log-variance; count values each), in the place of the standard normal numbers in
// `latent`; 0, with these untouched, if they are not all finite. The processor is little-endian, and so is npy.
extern "C" HERE int sample_latent(const Facts *facts, const uint16_t *moments, float *latent) {
    constexpr size_t AT_ONCE = 64;
    const size_t count = facts->count;
    if (!finite(moments, 2 * count)) return 0;
    const uint16_t *log_variance = moments + count;
    const __m256 scale = _mm256_set1_ps(facts->scale), shift = _mm256_set1_ps(facts->shift);
    float deviation[AT_ONCE], room[AT_ONCE];
    uint16_t mean[AT_ONCE] = {};
    for (size_t first = 0; first < count; first += AT_ONCE) {
        const size_t some = count - first < AT_ONCE ? count - first : AT_ONCE;
        for (size_t i = 0; i < some; ++i) deviation[i] = facts->deviation[log_variance[first + i]];
        const uint16_t *means = moments + first;
        float *values = latent + first;
        if (some < AT_ONCE) {  // the last few, in a place where whole vectors fit
            std::memset(deviation + some, 0, (AT_ONCE - some) * sizeof(float));
            std::memset(room, 0, sizeof room);
            std::memcpy(room, values, some * sizeof(float));
            std::memcpy(mean, means, some * sizeof(uint16_t));
            means = mean, values = room;
        }
        for (size_t i = 0; i < AT_ONCE; i += 8) {
            __m256 value = _mm256_mul_ps(_mm256_loadu_ps(values + i), _mm256_loadu_ps(deviation + i));
            value = _mm256_add_ps(value, _mm256_cvtph_ps(load(reinterpret_cast<const uint8_t *>(means + i))));
            _mm256_storeu_ps(values + i, _mm256_add_ps(_mm256_mul_ps(value, scale), shift));
        }
        if (some < AT_ONCE) std::memcpy(latent + first, room, some * sizeof(float));
    }
    return 1;
}

namespace {

// A label below `classes` in decimal digits, or -1.
int64_t label_of(const uint8_t *text, int64_t size, int64_t classes) {
    if (size < 1 || size > 18) return -1;
    int64_t label = 0;
    for (int64_t i = 0; i < size; ++i) {
        if (text[i] < '0' || text[i] > '9') return -1;
        label = 10 * label + (text[i] - '0');
    }
    return label < classes ? label : -1;
}

// Whether a member is part of what is read; numbers of a damaged index may be anything.
bool inside(const Member &member, const Request &sample) {
    const int64_t before = member.offset - sample.begin;
    return member.offset >= sample.begin && member.size >= 0 && member.size <= sample.length && before <= sample.length - member.size;
}

// Its label, or -1 with `latent` untouched.
HERE int64_t read_latent(const Request &sample, float *latent) {
    const Facts *facts = sample.facts;
    if (facts == nullptr) return -1;
    const Member label = sample.label, array = sample.array;
    const int64_t size = static_cast<int64_t>(facts->header_size + 4 * facts->count * facts->flips);
    if (sample.length < 1 || sample.length > facts->room || array.size != size) return -1;
    if (!inside(label, sample) || !inside(array, sample)) return -1;
    ssize_t got;
    do got = pread(static_cast<int>(sample.file), facts->bytes, static_cast<size_t>(sample.length), sample.begin);
    while (got < 0 && errno == EINTR);
    if (got != sample.length) return -1;
    const uint8_t *text = facts->bytes + (label.offset - sample.begin), *bytes = facts->bytes + (array.offset - sample.begin);
    if (std::memcmp(bytes, facts->header, facts->header_size) != 0) return -1;
    if (crc32_of(text, static_cast<size_t>(label.size)) != label.crc32 || crc32_of(bytes, static_cast<size_t>(size)) != array.crc32) return -1;
    const int64_t found = label_of(text, label.size, facts->classes);
    const uint64_t skipped = facts->header_size + (sample.mirrored && facts->flips == 2 ? 4 * facts->count : 0);
    return found >= 0 && sample_latent(facts, reinterpret_cast<const uint16_t *>(bytes + skipped), latent) ? found : -1;
}

}  // namespace

// Read samples, compare them with their checksums, and make their latents in the place of the standard normal numbers in `latents`, one
// behind the other. `labels`: of each its label, or -1, with its numbers untouched, where anything is unusual.
extern "C" HERE void read_latents(const Request *samples, int64_t number, int64_t count, float *latents, int64_t *labels) {
    for (int64_t i = 0; i < number; ++i) {
        labels[i] = read_latent(samples[i], latents);
        latents += count;
    }
}

extern "C" uint32_t checksum(const uint8_t *bytes, uint64_t size) { return crc32_of(bytes, size); }

// Whether this processor has the instructions.
extern "C" int usable() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("f16c");
}
#else
extern "C" int usable() { return 0; }
#endif
