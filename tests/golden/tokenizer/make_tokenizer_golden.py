#!/usr/bin/env python3
"""Writes the golden files of tests/data_tokenizer_test.cpp: texts, and the ids that the `tokenizers`
library gives them.

  smollm2.jsonl       by a tokenizer built of the metadata of the demo model, a GGUF file
  NAME.json, .jsonl   small tokenizers trained here, one for each family of pre-tokenizers

usage: make_tokenizer_golden.py MODEL.gguf   with the packages tokenizers and gguf
"""
import json
import pathlib
import random
import sys
import sysconfig
import unicodedata

import gguf
import tokenizers
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

HERE = pathlib.Path(__file__).resolve().parent
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
OTHER = r"[A-Za-z]+|\d+|[^A-Za-z\d\s]+|\s+(?!\S)|\s+"  # known to nobody: goes through PCRE2

PROSE = """The quick brown fox jumps over the lazy dog.
I'd say we're done; they've said "it's fine", haven't they? You'll see, I'm sure.
I'D SAY WE'RE DONE, THEY'VE SAID IT'S FINE, YOU'LL SEE, I'M SURE. DON'T 'Tis 'twas rock'n'roll
In 1998, 3,141,592 people (12.5%) paid $1,234.56 each -- or €99; see pp. 10-12.
Visit https://example.org/a/b?c=d&e=f#g or write to someone@example.org!
A state-of-the-art, e.g. well-known, i.e. über-naïve café façade; Ångström, Dvořák, Łódź.
Wait... what?! No!!! Yes??? (maybe) [perhaps] {surely} <tag attr="x">y</tag> a/b\\c|d~e`f^g
x=1;y=22;z=333;w=4444;v=55555 0x1F 1e-5 3.14 1_000_000 v1.2.3-rc4 2024-02-29T23:59:59Z""".split("\n")

SCRIPTS = """Η γρήγορη καφέ αλεπού πηδάει πάνω από τον τεμπέλη σκύλο.
Съешь же ещё этих мягких французских булок, да выпей чаю.
敏捷的棕色狐狸跳过了懒狗。二〇二四年十二月三十一日，星期二。
いろはにほへと ちりぬるを、カタカナとひらがなと漢字。１２３４５
다람쥐 헌 쳇바퀴에 타고파. 안녕하세요, 세계!
الثعلب البني السريع يقفز فوق الكلب الكسول. ١٢٣٤٥
השועל החום המהיר קופץ מעל הכלב העצלן. שָׁלוֹם
तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। १२३४५
দ্রুত বাদামী শিয়াল অলস কুকুরের উপর লাফ দেয়। ১২৩
விரைவான பழுப்பு நரி சோம்பேறி நாயின் மீது தாவுகிறது.
ที่สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ ๑๒๓
ქართული ენა არის მშვენიერი. Հայերեն լեզու։ አማርኛ ቋንቋ።
Con cáo nâu nhanh nhẹn nhảy qua con chó lười. Tiếng Việt có dấu.
ᚠᚢᚦᚨᚱᚲ 𐌰𐌱𐌲 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟏𝟐𝟑 Ⅷ ½ ² ₃ ㊿ ㉈ 𒐀 𞤀𞤁
मैं हूँ क़ ख़ ਖ਼ ଡ଼ 가각힣 각 Å Å Å ﬁ ﬀ ½ ﷺ Ω ℵ""".split("\n")

SYMBOLS = ["😀😃 👍🏽 👩‍👩‍👧‍👦 🇫🇷🇩🇪 ❤️ ☃︎ 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "e\u0301 a\u0323\u0302 o\u0302\u0323 q\u0307\u0323 \u0301x \u0344 \u0958",
           "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ ≠ ±∞ √2 ≈ 1.414 → ⇒ ↔ ∑∏∫", "┌─┐│└┘ ░▒▓█ ●○◆ ♠♥♦♣ ♩♪♫",
           "a\u00a0b\u2003c\u2028d\u2029e\u3000f\u200bg\u200dh\ufeffi\u0085j\u1680k\u180el",
           "\u0000\u0001\u0002\u0007\u0008\u000b\u000c\u001b[0m\u001c\u001d\u001e\u001f\u007f\u0080\u009f",
           "''' \"\"\" `` '' '\u017f 'S 'T 'Re 'vE 'M 'LL 'lL 'D 'x '' 's's 'd3 \u2019s \u02bcs",
           "\ud7a3\ue000\uf8ff\ufffd\uffff \U0001f9ff\U000e0001\U0010ffff"]

SPACES = ["", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r\n\r\n  ", " \n", "\n ", " \n \n ", "  a", "a  ",
          "a   b", " a  b ", "\ta\t\tb\t", "    return x\n\n\n    y", "a\n\n\nb", "a \n b", "x\r\ny\r\n",
          "!\n\n?", " !\n?\r\n", "  !  ?  ", "1 2  3   4", " 1\n2", "\u3000\u3000a", "a\u00a0\u00a0b", "\u2003\n\u2003x",
          "a\n\u00a0", "\n\t\n\tx", "if x:\n\tpass\n\n\n", "  \n  \n", "a.  \n\nB", "...\n", " ...  \n\n x"]


def special_lines(names):
    lines = []
    for a in names:
        lines += [a, f"x{a}y", f" {a} ", f"{a}{a}", f"a {a}\n{a} b", a[:-1], a[1:], a.upper()]
    lines.append("".join(names))
    return lines


def code_lines(count, seed):
    """A sample of lines, and of blocks of lines, of Python's standard library."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = []
    for name in sorted(p.name for p in root.glob("*.py")):
        text += (root / name).read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True)
    rng, lines = random.Random(seed), []
    for _ in range(count):
        start = rng.randrange(len(text))
        lines.append("".join(text[start:start + rng.choice([1, 1, 1, 2, 3, 8])])[:400])
    return lines


def random_lines(count, seed):
    """Characters of all kinds next to each other, where the expressions have their corner cases."""
    rng = random.Random(seed)
    pool = list(" \t\n\r'  sStTrReEvVmMlLdD09aZ.,!_-\u00a0\u3000\u0301\u017f\u00e9\u4e2d\u0663\u00bd\u0915\u093c\u1100\u1161\u11a8\u212b\ufb01😀")
    letters = [chr(c) for c in range(0x80, 0x30000) if unicodedata.category(chr(c))[0] in "LMNSZP"]
    lines = []
    for _ in range(count):
        kind = pool if rng.random() < 0.7 else letters
        lines.append("".join(rng.choice(kind if rng.random() < 0.9 else pool)
                             for _ in range(rng.randrange(1, 30))))
    return lines


def texts(names, code, noise):
    lines = PROSE + SCRIPTS + SYMBOLS + SPACES + special_lines(names)
    return lines + code_lines(code, 1) + random_lines(noise, 2)


def write_golden(name, tokenizer, lines):
    with open(HERE / f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps({"made_by": "make_tokenizer_golden.py",
                               "tokenizers": tokenizers.__version__}) + "\n")
        for text in lines:
            row = {"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids}
            decoded = tokenizer.decode(row["ids"], skip_special_tokens=False)
            if decoded != text:
                row["decoded"] = decoded
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def smollm2(path):
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    types = fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    write_golden("smollm2", tokenizer, texts(special, 2200, 900))


def split(expression):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(pre_tokenizer, added, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=256 + 1200, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # White space, marks and symbols need merges of their own: without, no wrong cut would show.
    lines = (PROSE + SCRIPTS + SYMBOLS + SPACES) * 20 + code_lines(2000, 3) + random_lines(3000, 4)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_tokens(added)
    return tokenizer


def families():
    special = [AddedToken(t, special=True, normalized=False) for t in ("<|begin|>", "<|end|>")]
    begin = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 256 + 1200)])])

    llama3 = train(split(LLAMA3), special)
    llama3.post_processor = begin
    yield "llama3", llama3, ["<|begin|>", "<|end|>"]

    words = [AddedToken("<|im_start|>", special=True, normalized=False),
             AddedToken("<|im_end|>", special=True, normalized=False),
             AddedToken("<think>", normalized=False), AddedToken("caf\u00e9x", normalized=True)]
    yield "qwen2", train(split(QWEN2), words, normalizers.NFC()), [t.content for t in words]

    odd = [AddedToken("<left>", lstrip=True, special=True, normalized=False),
           AddedToken("<right>", rstrip=True, special=True, normalized=False),
           AddedToken("<both>", lstrip=True, rstrip=True, special=True, normalized=False),
           AddedToken("word", single_word=True, normalized=False),
           AddedToken("<a", normalized=False), AddedToken("<a><b", normalized=False)]
    yield ("gpt2", train(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), odd),
           [t.content for t in odd] + ["  <left>  ", "\t<right>\u3000\n", " <both> \u00a0<both> <left>",
                                       "a word, words sword word\u0301 word_ (word) word1 wörd",
                                       "<a><a><b<a><c", "<right>  <left>"])

    yield "other", train(split(OTHER), special), ["<|end|>"]


def ignoring_merges(tokenizer):
    """Llama 3 sets ignore_merges. Two merges of a token go, so that it is reached no other way."""
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    merges = state["model"]["merges"]
    state["model"]["merges"] = [m for m in merges if "".join(m) not in ("self", "\u0120the")]
    return Tokenizer.from_str(json.dumps(state))


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    smollm2(sys.argv[1])
    for name, tokenizer, names in families():
        if name == "llama3":
            tokenizer = ignoring_merges(tokenizer)
        tokenizer.save(str(HERE / f"{name}.json"), pretty=False)
        write_golden(name, tokenizer, texts(names, 150, 500))


if __name__ == "__main__":
    main()
