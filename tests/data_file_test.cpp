#include "data/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <thread>

#include "core/parallel.h"
#include "tests/support/files.h"

namespace qlab {
namespace {

using testing::AllOf;
using testing::HasSubstr;

int entries(const std::string& folder) {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++count;
  return count;
}

TEST(File, WritesAtomically) {
  const test::TemporaryFolder folder;
  write_file_atomically(folder / "x", "old");
  {
    AtomicFile file(folder / "x");
    file.write("new, never committed");
    EXPECT_EQ(read_text_file(folder / "x"), "old");
    EXPECT_EQ(entries(folder.path()), 2);
  }
  EXPECT_EQ(read_text_file(folder / "x"), "old");
  EXPECT_EQ(entries(folder.path()), 1);
  write_file_atomically(folder / "x", "new");
  EXPECT_EQ(read_text_file(folder / "x"), "new");
}

// Containers that share a folder have equal process ids, and equal counts of what was written.
TEST(File, TemporaryNamesSayMoreThanTheProcess) {
  const test::TemporaryFolder folder;
  const auto temporary = [&](const std::string& own) {
    std::filesystem::create_directory(folder / own);
    const AtomicFile file(folder / (own + "/x"));
    std::string name =
        std::filesystem::directory_iterator(folder / own)->path().filename().string();
    const std::string id = std::to_string(getpid());
    if (const size_t at = name.find(id); at != name.npos) name.replace(at, id.size(), "ID");
    return name;
  };
  const pid_t child = fork();
  if (child == 0) {
    folder.write("name", temporary("child"));
    _exit(0);
  }
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_NE(read_text_file(folder / "name"), temporary("parent"));
}

TEST(File, OnlyTemporaryFilesAreRemoved) {
  const test::TemporaryFolder folder;
  write_file_atomically(folder / "x", "kept");
  folder.write("notes.tmp", "kept");
  folder.write("a.b.tmp", "kept");
  folder.write("x.4711-3.tmp", "of an earlier version");
  AtomicFile file(folder / "x");
  EXPECT_EQ(entries(folder.path()), 5);
  remove_temporary_files(folder.path());
  EXPECT_EQ(entries(folder.path()), 3);
  remove_temporary_files(folder / "gone");
}

TEST(FileLock, IsHeldUntilItGoes) {
  const test::TemporaryFolder folder;
  EXPECT_FALSE(FileLock::held(folder / "lock"));
  EXPECT_EQ(entries(folder.path()), 0);
  {
    const auto lock = FileLock::take(folder / "lock", false);
    EXPECT_TRUE(FileLock::held(folder / "lock"));
    EXPECT_FALSE(FileLock::take(folder / "lock", false));
  }
  EXPECT_FALSE(FileLock::held(folder / "lock"));
  EXPECT_TRUE(FileLock::take(folder / "lock", false));
}

// A report that is made just then must not make a sweep skip the trial.
TEST(FileLock, AskingKeepsNobodyFromTakingIt) {
  const test::TemporaryFolder folder;
  const int asks = ::open((folder / "lock").c_str(), O_CREAT | O_RDWR, 0644);
  ASSERT_EQ(::flock(asks, LOCK_SH), 0);
  EXPECT_FALSE(FileLock::held(folder / "lock"));  // by one who asks as well
  std::thread ending([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    ::close(asks);
  });
  EXPECT_TRUE(FileLock::take(folder / "lock", false));
  ending.join();
}

TEST(File, ErrorsNamePathAndReason) {
  const test::TemporaryFolder folder;
  EXPECT_THAT(test::error_of([&] { write_file_atomically(folder / "a/b", "x"); }),
              AllOf(HasSubstr(folder / "a/b"), HasSubstr("No such file")));
  EXPECT_THAT(test::error_of([&] { MappedFile(folder / "absent"); }),
              AllOf(HasSubstr(folder / "absent"), HasSubstr("No such file")));
  EXPECT_THAT(test::error_of([&] { MappedFile file(folder.path()); }), HasSubstr("regular file"));
}

TEST(File, FullDiskLeavesTheOldFile) {
  const test::TemporaryFolder folder;
  write_file_atomically(folder / "x", "old");
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto previous = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1000, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  const std::string error =
      test::error_of([&] { write_file_atomically(folder / "x", std::string(5000, 'y')); });
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, previous);
  EXPECT_THAT(error, AllOf(HasSubstr(folder / "x"), HasSubstr("too large")));
  EXPECT_EQ(read_text_file(folder / "x"), "old");
  EXPECT_EQ(entries(folder.path()), 1);
}

TEST(File, MapsEmptyFiles) {
  const test::TemporaryFolder folder;
  EXPECT_EQ(MappedFile(folder.write("x", "")).size(), 0u);
  EXPECT_EQ(read_text_file(folder / "x"), "");
}

TEST(File, MappingOutlivesItsHandle) {
  const test::TemporaryFolder folder;
  std::unique_ptr<MappedFile> copy;
  {
    const MappedFile first(folder.write("x", "content"));
    copy = std::make_unique<MappedFile>(first);
  }
  EXPECT_EQ(static_cast<char>(copy->bytes()[0]), 'c');
}

TEST(Fingerprint, ChangesWithEveryBit) {
  std::string text(100, 'x');
  const std::string before = Fingerprint().add(text).hex();
  EXPECT_EQ(before.size(), 32u);
  EXPECT_EQ(before, Fingerprint().add(text).hex());
  for (size_t i = 0; i < text.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      text[i] = static_cast<char>(text[i] ^ (1 << bit));
      EXPECT_NE(before, Fingerprint().add(text).hex());
      text[i] = static_cast<char>(text[i] ^ (1 << bit));
    }
  }
  EXPECT_NE(before, Fingerprint().add(text + '\0').hex());
  EXPECT_NE(Fingerprint().add("ab").add("c").hex(), Fingerprint().add("a").add("bc").hex());
}

TEST(Fingerprint, InBlocksWhateverTheThreads) {
  std::string text((size_t{3} << 20) + 5, 'x');
  const auto hex = [&] {
    return Fingerprint().add_in_blocks(std::as_bytes(std::span(text))).hex();
  };
  const std::string before = hex();
  const int threads = thread_count();
  set_thread_count(3);
  EXPECT_EQ(hex(), before);
  set_thread_count(threads);
  for (const size_t i : {size_t{0}, size_t{1} << 20, text.size() / 2, text.size() - 1}) {
    text[i] = 'y';
    EXPECT_NE(hex(), before) << i;
    text[i] = 'x';
  }
  text[0] = 'y';
  const std::string first = hex();
  text[0] = 'x';
  text[size_t{1} << 20] = 'y';  // the same block at another place
  EXPECT_NE(hex(), first);
  text += 'x';
  EXPECT_NE(hex(), before);
}

}  // namespace
}  // namespace qlab
