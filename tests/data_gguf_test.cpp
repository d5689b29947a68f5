#include "data/gguf.h"

#include <cstring>

#include "data/safetensors.h"
#include "tests/support/files.h"

namespace qlab {
namespace {

using test::golden;
using testing::AllOf;
using testing::HasSubstr;

class GgufBlocks : public testing::TestWithParam<Encoding> {};

TEST_P(GgufBlocks, DequantizeAsTheReferenceDoes) {
  const GgufFile file(golden("model_files/blocks.gguf"));
  const SafetensorsFile expected(golden("model_files/blocks.safetensors"));
  const std::string name = info_of(GetParam()).name;
  const GgufTensor& tensor = file.tensors().at(name);
  EXPECT_EQ(tensor.encoding, GetParam());
  EXPECT_EQ(tensor.shape, expected.entries().at(name).shape);
  const auto want = expected.read(name, DType::f32).to_vector<float>();
  const auto n = static_cast<int64_t>(want.size());
  std::vector<float> got(want.size());
  decode_to_float(tensor.encoding, file.bytes(tensor).data(), n, got.data());
  EXPECT_EQ(got, want);

  std::vector<bf16> narrow(want.size());
  decode(tensor.encoding, file.bytes(tensor).data(), n, DType::bf16, narrow.data());
  std::vector<double> wide(want.size());
  decode(tensor.encoding, file.bytes(tensor).data(), n, DType::f64, wide.data());
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(narrow[i].bits, bf16(want[i]).bits);
    EXPECT_EQ(wide[i], static_cast<double>(want[i]));
  }
}
INSTANTIATE_TEST_SUITE_P(Data, GgufBlocks,
                         testing::Values(Encoding::f32, Encoding::f16, Encoding::bf16,
                                         Encoding::q4_0, Encoding::q4_1, Encoding::q5_0,
                                         Encoding::q5_1, Encoding::q8_0, Encoding::q4_k,
                                         Encoding::q5_k, Encoding::q6_k),
                         [](const auto& info) { return std::string(info_of(info.param).name); });

/// Writes GGUF byte by byte, right or wrong.
class Writer {
 public:
  template <class T>
  Writer& number(T value) {
    text_.append(reinterpret_cast<const char*>(&value), sizeof(value));
    return *this;
  }
  Writer& raw(const std::string& bytes) {
    text_ += bytes;
    return *this;
  }
  Writer& string(const std::string& value) { return number<uint64_t>(value.size()).raw(value); }
  Writer& preamble(uint64_t tensors, uint64_t values, uint32_t version = 3) {
    return raw("GGUF").number(version).number(tensors).number(values);
  }
  Writer& text_value(const std::string& key, const std::string& value) {
    return string(key).number<uint32_t>(8).string(value);
  }
  Writer& tensor(const std::string& name, std::vector<uint64_t> dims, uint32_t type,
                 uint64_t offset) {
    string(name).number(static_cast<uint32_t>(dims.size()));
    for (const uint64_t d : dims) number(d);
    return number(type).number(offset);
  }
  Writer& data(size_t bytes) {
    text_.resize((text_.size() + 31) / 32 * 32);
    text_.append(bytes, '\1');
    return *this;
  }
  std::string str() const { return text_; }

 private:
  std::string text_;
};

constexpr uint32_t f32 = 0, q4_1 = 3;

struct Malformed {
  const char* name;
  std::string content;
  const char* message;
};

std::vector<Malformed> malformed_files() {
  const uint64_t huge = uint64_t{1} << 40;
  const auto one = [](std::vector<uint64_t> dims, uint32_t type, uint64_t offset, size_t bytes) {
    return Writer().preamble(1, 0).tensor("x", std::move(dims), type, offset).data(bytes).str();
  };
  const auto two = [](const char* second, uint64_t offset) {
    Writer writer;
    writer.preamble(2, 0).tensor("x", {16}, f32, 0).tensor(second, {16}, f32, offset);
    return writer.data(200).str();
  };
  return {
      {"Empty", "", "not a GGUF file"},
      {"OtherMagic", "GGML" + std::string(40, '\0'), "not a GGUF file"},
      {"VersionOne", Writer().preamble(0, 0, 1).str(), "version 1"},
      {"VersionFour", Writer().preamble(0, 0, 4).str(), "version 4"},
      {"BigEndian", Writer().preamble(0, 0, 3u << 24).str(), "big-endian"},
      {"TruncatedPreamble", Writer().raw("GGUF").number<uint32_t>(3).str(), "fetch it again"},
      {"TruncatedMetadata", Writer().preamble(0, 2).text_value("a", "b").str(), "truncated"},
      {"LyingString", Writer().preamble(0, 1).number(huge).raw("a").str(), "truncated"},
      {"LyingArray",
       Writer()
           .preamble(0, 1)
           .string("a")
           .number<uint32_t>(9)
           .number<uint32_t>(4)
           .number(huge)
           .str(),
       "claims"},
      {"NestedArray",
       Writer()
           .preamble(0, 1)
           .string("a")
           .number<uint32_t>(9)
           .number<uint32_t>(9)
           .number(huge)
           .str(),
       "arrays of arrays"},
      {"UnknownValueType", Writer().preamble(0, 1).string("a").number<uint32_t>(13).str(),
       "unknown value type 13"},
      {"DuplicateKey", Writer().preamble(0, 2).text_value("a", "b").text_value("a", "c").str(),
       "\"a\" appears twice"},
      {"BadAlignment",
       Writer()
           .preamble(0, 1)
           .string("general.alignment")
           .number<uint32_t>(4)
           .number<uint32_t>(12)
           .str(),
       "multiple of 8"},
      {"AlignmentNotANumber", Writer().preamble(0, 1).text_value("general.alignment", "x").str(),
       "wrong type"},
      {"UnknownTensorType", one({32}, 10, 0, 100), "GGUF type 10 is not supported"},
      {"NoDimensions", one({}, f32, 0, 100), "0 dimensions"},
      {"FiveDimensions", one({1, 1, 1, 1, 1}, f32, 0, 100), "5 dimensions"},
      {"ProductOverflow", one({huge, huge}, f32, 0, 100), "too large"},
      {"PartOfABlock", one({48}, q4_1, 0, 100), "blocks of 32"},
      {"PastTheEnd", one({64}, f32, 0, 100), "truncated"},
      {"OffsetPastTheEnd", one({1}, f32, huge, 100), "truncated"},
      {"Misaligned", one({1}, f32, 8, 100), "not aligned"},
      {"DuplicateTensor", two("x", 64), "appears twice"},
      {"Overlap", two("y", 32), "overlap"},
  };
}

class GgufMalformed : public testing::TestWithParam<Malformed> {};

TEST_P(GgufMalformed, IsRefused) {
  const test::TemporaryFolder folder;
  const std::string path = folder.write("model.gguf", GetParam().content);
  EXPECT_THAT(test::error_of([&] { GgufFile{path}; }),
              AllOf(HasSubstr(path), HasSubstr(GetParam().message)));
}
INSTANTIATE_TEST_SUITE_P(Data, GgufMalformed, testing::ValuesIn(malformed_files()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Gguf, EveryTruncationIsRefused) {
  const std::string whole = read_text_file(golden("model_files/llama.gguf"));
  const test::TemporaryFolder folder;
  for (size_t size = 0; size < whole.size(); size += 97) {
    const std::string path = folder.write("model.gguf", whole.substr(0, size));
    EXPECT_NE(test::error_of([&] { GgufFile{path}; }), "") << size;
  }
}

TEST(Gguf, ReadsMetadata) {
  const GgufFile file(golden("model_files/llama.gguf"));
  EXPECT_EQ(file.get<std::string>("general.architecture"), "llama");
  EXPECT_EQ(file.get<int64_t>("llama.embedding_length"), 24);
  EXPECT_EQ(file.get<double>("llama.attention.layer_norm_rms_epsilon"), 1e-5);
  EXPECT_EQ(file.get<int64_t>("absent", 7), 7);
  EXPECT_THAT(test::error_of([&] { file.get<int64_t>("absent"); }), HasSubstr("\"absent\""));
  EXPECT_THAT(test::error_of([&] { file.get<int64_t>("general.architecture"); }),
              HasSubstr("wrong type"));
}

}  // namespace
}  // namespace qlab
