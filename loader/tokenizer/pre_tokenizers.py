"""The pre-tokenizers that `tokenizer.ggml.pre` names, as data.

A pre-tokenizer cuts text into words before byte-pair merging. It is a list of regular expressions (Oniguruma
syntax), each applied to the pieces that the one before it left: every match becomes a piece of its own, and
so does what lies between matches.

Names and defaults are those of llama.cpp (src/llama-vocab.cpp). Where that program approximates an expression
because its own engine lacks a feature, the table has the expression of the model's published tokenizer.json
instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _llama3(
    numbers: str = r"\p{N}{1,3}",
    contractions: str = _CONTRACTIONS + "|",
    letter: str = r"\p{L}",
    spaces: str = _SPACES,
) -> str:
    """The cl100k family: contractions, words with one leading sign, numbers, signs with line ends, spaces."""
    no_word = r"[^\s\p{L}\p{N}]" if letter == r"\p{L}" else r"[^\s\p{L}\p{M}\p{N}]"
    return rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?{letter}+|{numbers}| ?{no_word}+[\r\n]*|{spaces}"


def _o200k(
    numbers: str = r"\p{N}{1,3}",
    contractions: str = _CONTRACTIONS + "?",
    not_han: str = "",
    line_end: str = r"[\r\n/]*",
) -> str:
    """The o200k family: words are also cut where lower case turns into upper case."""
    upper, lower = (
        rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{not_han}]",
        rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{not_han}]",
    )
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{lead}{upper}*{lower}+{contractions}|{lead}{upper}+{lower}*{contractions}"
        rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+{line_end}|{_SPACES}"
    )


_QWEN2 = _llama3(numbers=r"\p{N}")
_LINES = r"[^\n]+|\n+"

# Digits in threes counted from the right: the piece must be a whole number, so that the look-ahead runs once.
_DIGIT_GROUPS = r"\A\p{N}{1,2}(?=(?:\p{N}{3})+\z)|\p{N}{3}"
# The same where the digits end a word, and only there; \G continues what began at the start of such a number.
_WORD_FINAL_NUMBER = r"(?<!\d)\d++\b"
_WORD_FINAL_DIGIT_GROUPS = r"\A(?=\d++\z)(?:\d{1,2}(?=(?:\d{3})+\z)|\d{3})|(?!\A)\G\d{3}"

_ASCII_SIGN_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_DEEPSEEK3_WORDS = (
    _ASCII_SIGN_WORD + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)
_DEEPSEEK_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3_IDEOGRAPHS = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_LLM_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _DEEPSEEK3_IDEOGRAPHS
)
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
# Its spaces are cut into many pieces; the line end that may follow them is looked for from the first alone.
_JAIS2_SPACES = (
    r"(?<![^\S\r\n])\s*[\r\n]+|"
    + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut into words, and the defaults that models with this pre-tokenizer have.

    patterns: regular expressions, applied in order, each isolating its matches.
    ignore_merges: a word that is a token is that token, without looking at the merges.
    add_bos: whether encoding begins with the begin-of-sequence token when the file does not say.
    byte_level: words are spelled in the 256 byte characters of GPT-2; else in UTF-8 with U+2581 for the
        space and `<0xXX>` tokens for what the vocabulary lacks.
    drop_spaces: white space only separates words and yields no tokens.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True
    drop_spaces: bool = False


_BY_WORDS = PreTokenizer((_GPT2,))
_DIGITS_THEN_WORDS = PreTokenizer((r"\p{N}", _GPT2))
_CL100K = PreTokenizer((_llama3(),))
_ONE_DIGIT = PreTokenizer((_QWEN2,))
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _DEEPSEEK3_IDEOGRAPHS, _DEEPSEEK3_WORDS))
_LARGE_O200K = PreTokenizer((_o200k(),))
_BY_LINES = PreTokenizer((_LINES,), byte_level=False)
_BAILING = PreTokenizer(
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    )
)
_TINY_AYA = PreTokenizer((_WORD_FINAL_NUMBER, _WORD_FINAL_DIGIT_GROUPS, _o200k()))


def _named(names: str, pre_tokenizer: PreTokenizer) -> Iterable[tuple[str, PreTokenizer]]:
    return ((name, pre_tokenizer) for name in names.split())


DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))

PRE_TOKENIZERS: dict[str, PreTokenizer] = dict(
    [
        ("default", DEFAULT),
        *_named(
            "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat"
            " a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion granite-docling",
            _BY_WORDS,
        ),
        *_named(
            "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
            _DIGITS_THEN_WORDS,
        ),
        *_named("dbrx smaug-bpe chatglm-bpe", _CL100K),
        *_named("glm4 glm5", replace(_CL100K, ignore_merges=True)),
        *_named(
            "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
            replace(_CL100K, ignore_merges=True, add_bos=True),
        ),
        *_named(
            "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
            _ONE_DIGIT,
        ),
        ("qwen35", PreTokenizer((_llama3(numbers=r"\p{N}", letter=r"[\p{L}\p{M}]"),))),
        ("ufakzeka", PreTokenizer((_llama3(numbers=r"\p{N}", contractions=""),))),
        ("laguna", PreTokenizer((_LINES, _QWEN2))),
        ("jais-2", PreTokenizer((_llama3(spaces=_JAIS2_SPACES),))),
        ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _llama3(numbers=r"\p{N}+")), ignore_merges=True)),
        (
            "seed-coder",
            PreTokenizer(
                (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES,)
            ),
        ),
        (
            "exaone-moe",
            PreTokenizer(
                (
                    _CONTRACTIONS
                    + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
                    r"|\s*[\r\n]|\s+(?!\S)|\s+",
                )
            ),
        ),
        *_named("bailingmoe bailingmoe2 llada-moe", _BAILING),
        *_named("gpt-4o llama4 kanana2 talkie minimax-m2", _LARGE_O200K),
        ("granite-embed-multi-97m", replace(_LARGE_O200K, ignore_merges=True)),
        (
            "tekken",
            PreTokenizer((_o200k(numbers=r"\p{N}", contractions=""),), ignore_merges=True, add_bos=True),
        ),
        ("youtu", PreTokenizer((_YOUTU_SCRIPTS, _o200k(numbers=r"\p{N}")), ignore_merges=True)),
        ("kimi-k2", PreTokenizer((r"\p{Han}+|" + _o200k(not_han=r"&&[^\p{Han}]", line_end=r"[\r\n]*"),))),
        *_named("tiny_aya cohere2moe", _TINY_AYA),
        *_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3),
        (
            "spark2_5",
            PreTokenizer(
                (
                    r"\p{N}{1,3}",
                    _DEEPSEEK3_IDEOGRAPHS,
                    _ASCII_SIGN_WORD
                    + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
                    r"\p{N}",
                )
            ),
        ),
        ("afmoe", PreTokenizer((r"\p{N}+", _DIGIT_GROUPS, _AFMOE_SCRIPTS, _DEEPSEEK3_WORDS))),
        ("superbpe", PreTokenizer((r"\p{N}+", _DIGIT_GROUPS))),
        (
            "deepseek-llm",
            PreTokenizer(
                (
                    r"[\r\n]",
                    rf"\s?[{_DEEPSEEK_LLM_LETTERS}]+",
                    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                    r"(?<!\s)\s++$",  # tried once a run: \s+$ would be tried from each of its characters
                    _DEEPSEEK_IDEOGRAPHS,
                    r"\p{N}+",
                )
            ),
        ),
        (
            "deepseek-coder",
            PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_IDEOGRAPHS, r"\p{N}")),
        ),
        ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
        *_named("poro-chat bloom gpt3-finnish", PreTokenizer((_BLOOM,))),
        ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
        (
            "chameleon",
            PreTokenizer(
                (
                    "<sentinel:[0-9]+>",
                    "IMGIMG[A-I]{1,4}Z",
                    r"[\t\n]|    |  ",
                    r"\p{N}",
                    r"[\p{P}!-/:-@\[-`{-~]",
                    _GPT2,
                ),
                add_bos=True,
            ),
        ),
        ("gemma4", replace(_BY_LINES, add_bos=True)),
        *_named("granite-embed-multi-311m", replace(_BY_LINES, add_bos=True)),
        ("sarvam-moe", _BY_LINES),
        ("whitespace", PreTokenizer((r"\s+",), byte_level=False, drop_spaces=True)),
    ]
)
"""Every known value of `tokenizer.ggml.pre`."""
