#include "data/safetensors.h"

#include <cmath>
#include <cstring>

#include "tests/support/files.h"

namespace qlab {
namespace {

using test::golden;
using testing::AllOf;
using testing::HasSubstr;

DType dtype_in_file(const std::string& name) {
  if (name == "F64") return DType::f64;
  if (name == "F32") return DType::f32;
  if (name == "F16") return DType::f16;
  if (name == "BF16") return DType::bf16;
  if (name == "I64") return DType::i64;
  if (name == "I32") return DType::i32;
  return DType::u8;
}

TEST(Safetensors, RoundTripEqualsReferenceWriter) {
  const std::string path = golden("model_files/reference.safetensors");
  const SafetensorsFile file(path);
  std::vector<std::pair<std::string, Tensor>> tensors;
  for (const auto& [name, entry] : file.entries())
    tensors.emplace_back(name, file.read(name, dtype_in_file(entry.dtype)));
  EXPECT_EQ(tensors.size(), 10u);
  const test::TemporaryFolder folder;
  write_safetensors(folder / "copy.safetensors", tensors, file.metadata());
  EXPECT_EQ(read_text_file(folder / "copy.safetensors"), read_text_file(path));
}

TEST(Safetensors, Converts) {
  const SafetensorsFile file(golden("model_files/reference.safetensors"));
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.read("scalar", DType::f64).data<double>()[0], 2.5);
  EXPECT_EQ(file.read("scalar", DType::f32).shape(), Shape{});
  EXPECT_EQ(file.read("empty", DType::bf16).shape(), (Shape{0, 4}));
  const auto exact = file.read("double", DType::f64).to_vector<double>();
  const auto rounded = file.read("double", DType::f32).to_vector<float>();
  for (size_t i = 0; i < exact.size(); ++i) EXPECT_EQ(rounded[i], static_cast<float>(exact[i]));
  const auto wide = file.read("b.weight", DType::f32).to_vector<float>();
  const auto narrow = file.read("b.weight", DType::bf16).to_vector<bf16>();
  for (size_t i = 0; i < wide.size(); ++i) EXPECT_EQ(narrow[i].bits, bf16(wide[i]).bits);
  for (const float x : file.read("h", DType::f32).to_vector<float>()) EXPECT_LT(std::abs(x), 5.0f);
  EXPECT_THAT(test::error_of([&] { file.read("ids", DType::f32); }), HasSubstr("\"ids\""));
  EXPECT_THAT(test::error_of([&] { file.read("absent", DType::f32); }),
              AllOf(HasSubstr("reference.safetensors"), HasSubstr("\"absent\"")));
}

TEST(Safetensors, ReadsWhatItWrites) {
  const test::TemporaryFolder folder;
  const Tensor x = Tensor::from_vector<float>({1, 2, 3, 4, 5, 6}, {2, 3}, Device::cpu());
  write_safetensors(folder / "x.safetensors", {{"x", x}}, {});
  const SafetensorsFile file(folder / "x.safetensors");
  EXPECT_TRUE(file.metadata().empty());
  EXPECT_EQ(file.read("x", DType::f32).to_vector<float>(), x.to_vector<float>());
  EXPECT_THAT(test::error_of([&] {
                write_safetensors(folder / "y", {{"x", x}, {"x", x}});
              }),
              HasSubstr("two tensors"));
  EXPECT_THAT(test::error_of([&] {
                write_safetensors(folder / "no/y", {{"x", x}});
              }),
              HasSubstr("No such file"));
}

struct Malformed {
  const char* name;
  std::string content;
  const char* message;
};

std::string with_header(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::string content(reinterpret_cast<const char*>(&length), sizeof(length));
  return content + header + std::string(data_bytes, '\1');
}

std::string with_length(uint64_t length, const std::string& rest) {
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + rest;
}

/// A file with tensors x and y of four bytes each, except as given.
std::string two(const std::string& x, const std::string& y, size_t data_bytes) {
  return with_header("{\"x\":{" + x + "},\"y\":{" + y + "}}", data_bytes);
}
const std::string good_x = R"("dtype":"F32","shape":[1],"data_offsets":[0,4])";
const std::string good_y = R"("dtype":"F32","shape":[1],"data_offsets":[4,8])";

std::vector<Malformed> malformed_files() {
  const auto one = [](const std::string& x, size_t bytes) {
    return with_header("{\"x\":{" + x + "}}", bytes);
  };
  return {
      {"Empty", "", "truncated"},
      {"SevenBytes", "1234567", "truncated"},
      {"HeaderLongerThanFile", with_length(100, "{}"), "claims 100 bytes"},
      {"HeaderLengthOverflow", with_length(UINT64_MAX - 3, "{}"), "claims"},
      {"HeaderOverTheLimit", with_length(100'000'001, "{}"), "claims"},
      {"NotAnObject", with_header("[]", 0), "does not start"},
      {"LeadingSpace", with_header(" {}", 0), "does not start"},
      {"InvalidJson", with_header("{\"x\":", 0), "not valid JSON"},
      {"NotUtf8", with_header("{\"x\xff\":1}", 0), "not valid JSON"},
      {"NulByte", with_header(std::string("{}\0\0", 4), 0), "NUL"},
      {"TextAfterTheHeader", with_header("{} x", 0), "not valid JSON"},
      {"DuplicateTensor", with_header("{\"x\":{" + good_x + "},\"x\":{" + good_x + "}}", 4),
       "duplicate key \"x\""},
      {"DuplicateField", one(R"("dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4])", 4),
       "duplicate key"},
      {"FirstNotAtZero", one(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])", 8), "hole"},
      {"Hole", two(good_x, R"("dtype":"F32","shape":[1],"data_offsets":[8,12])", 12), "hole"},
      {"Overlap", two(good_x, R"("dtype":"F32","shape":[1],"data_offsets":[2,6])", 6), "overlap"},
      {"SameRange", two(good_x, good_x, 4), "overlap"},
      {"EndBeforeBegin", one(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])", 4),
       "ends before"},
      {"ProductOverflow",
       one(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4])", 4),
       "too large"},
      {"DimensionOverflow",
       one(R"("dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,4])", 4), "too large"},
      {"PartOfAByte", one(R"("dtype":"F4","shape":[3],"data_offsets":[0,2])", 2), "bits"},
      {"SizeAgainstShape", one(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])", 4), "64 bits"},
      {"SizeAgainstDtype", one(R"("dtype":"BF16","shape":[1],"data_offsets":[0,4])", 4), "16 bits"},
      {"UnknownDtype", one(R"("dtype":"Q4","shape":[1],"data_offsets":[0,4])", 4), "unknown dtype"},
      {"NegativeDimension", one(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])", 4),
       "non-negative"},
      {"FractionalOffset", one(R"("dtype":"F32","shape":[1],"data_offsets":[0,4.0])", 4),
       "non-negative"},
      {"OneOffset", one(R"("dtype":"F32","shape":[1],"data_offsets":[4])", 4), "two numbers"},
      {"MissingField", one(R"("dtype":"F32","shape":[1])", 4), "dtype, shape and data_offsets"},
      {"EntryNotAnObject", with_header("{\"x\":3}", 0), "must be an object"},
      {"Truncated", one(good_x, 3), "truncated"},
      {"SurplusBytes", one(good_x, 5), "surplus"},
      {"MetadataNotAnObject", with_header("{\"__metadata__\":[]}", 0), "__metadata__"},
      {"MetadataNotText", with_header("{\"__metadata__\":{\"a\":1}}", 0), "must be a string"},
      {"DeepNesting", with_header("{\"x\":" + std::string(5000, '['), 0), "nested deeper"},
  };
}

class SafetensorsMalformed : public testing::TestWithParam<Malformed> {};

TEST_P(SafetensorsMalformed, IsRefused) {
  const test::TemporaryFolder folder;
  const std::string path = folder.write("model.safetensors", GetParam().content);
  EXPECT_THAT(test::error_of([&] { SafetensorsFile{path}; }),
              AllOf(HasSubstr(path), HasSubstr(GetParam().message)));
}
INSTANTIATE_TEST_SUITE_P(Data, SafetensorsMalformed, testing::ValuesIn(malformed_files()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Safetensors, AllowsWhatTheFormatAllows) {
  const test::TemporaryFolder folder;
  const SafetensorsFile padded(
      folder.write("padded", with_header("{\"x\":{" + good_x + "}}    ", 4)));
  EXPECT_EQ(padded.entries().size(), 1u);
  const SafetensorsFile none(folder.write("none", with_header("{}", 0)));
  EXPECT_TRUE(none.entries().empty());
  const SafetensorsFile empty(folder.write(
      "empty", with_header(R"({"e":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]}})", 0)));
  EXPECT_EQ(empty.read("e", DType::f32).numel(), 0);
}

}  // namespace
}  // namespace qlab
