// Training and evaluation examples, from JSON lines or synthetic.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/tokenizer.h"

namespace qlab {

/// Labels are aligned with input_ids (the model shifts them); -100 where not trained.
struct Example {
  std::vector<int32_t> input_ids, labels;
};
inline constexpr int32_t not_trained = -100;

struct DatasetOptions {
  int64_t seq_len = 512;        // longer examples lose their end
  bool completion_only = true;  // false: prompts and the turns of users are trained too
  std::string chat_template = "chatml";
  std::function<void()> between_examples = {};  // may throw, which ends the reading
};

struct Dataset {
  std::vector<Example> examples;
  int64_t lines = 0;  // that held an example
  int64_t truncated = 0;
  int64_t dropped = 0;  // nothing trained left
  int64_t trained_tokens =
      0;  // labels other than -100 at positions >= 1: position 0 is never predicted
  int64_t tokens = 0;
  std::string fingerprint;  // of the file's content
};

/// Each line is one of
///   {"prompt": text, "completion": text}    tokenized apart and joined, EOS appended and trained
///   {"text": text}                          EOS appended, all trained
///   {"messages": [{"role", "content"}]}     ChatML; the assistant's content and its <|im_end|>
///   trained. Tokens are those of the whole text, but none spans the start of an answer.
///   {"input_ids": ids, "labels": ids}       taken as they are
/// The first two begin with what the tokenizer's own template puts first (BOS, for some).
/// A line that is none of them is an Error with file and line; so is a set with nothing to train.
Dataset load_dataset(const std::string& path, const Tokenizer& tokenizer,
                     const DatasetOptions& options);

/// Whether the first line of a file needs a tokenizer.
bool holds_text(const std::string& path);

/// Random tokens, all trained.
Dataset synthetic_dataset(int64_t examples, int64_t seq_len, int64_t vocab_size, uint64_t seed);

}  // namespace qlab
