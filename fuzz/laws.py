"""Laws of the tests as targets for atheris: `python fuzz/laws.py LAW [libFuzzer options] [CORPUS]`; alone it lists them.

Hypothesis turns the fuzzer's bytes into what the law is about, so that most inputs are nearly right.
"""

import importlib
import sys
from pathlib import Path

import atheris

TESTS = Path(__file__).resolve().parents[1] / "tests" / "inference" / "serve"

LAWS = {
    "http-any-bytes": ("test_fuzz_http", "test_any_bytes_are_answered_without_a_fault_of_ours"),
    "http-pieces": ("test_fuzz_http", "test_the_answers_do_not_depend_on_how_the_bytes_are_cut"),
    "http-heads-seen-before": ("test_fuzz_http", "test_a_head_seen_before_changes_no_answer"),
    "http-order": ("test_fuzz_http", "test_answers_leave_in_the_order_of_the_requests_whenever_they_become_ready"),
    "rows-quick-and-long": ("test_fuzz_rows", "test_quick_and_long_never_disagree"),
    "rows-read-or-refused": ("test_fuzz_rows", "test_whatever_is_sent_is_read_or_refused_with_a_reason"),
    "tensors-json-and-binary": ("test_fuzz_tensors", "test_json_and_binary_are_read_alike"),
    "tensors-read-or-refused": ("test_fuzz_tensors", "test_whatever_is_sent_is_read_or_refused_with_a_reason"),
    "tensors-headers-seen-before": ("test_fuzz_tensors", "test_a_header_seen_before_changes_no_reading"),
    "grpc-outlines": ("test_infer_message", "test_law_whatever_the_bytes_remembering_changes_nothing"),
    "grpc-any-bytes": ("test_infer_message", "test_law_no_bytes_break_the_reader"),
    "http2-pieces": ("test_http2", "test_law_how_bytes_are_cut_changes_no_answer"),
    "http2-frames": ("test_http2", "test_law_no_sequence_of_frames_breaks_the_server"),
    "http2-damage": ("test_http2", "test_law_no_damage_to_a_conversation_breaks_the_server"),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in LAWS:
        sys.exit("give one of these laws:\n  " + "\n  ".join(LAWS))
    module, test = LAWS[sys.argv.pop(1)]
    sys.path.insert(0, str(TESTS))
    with atheris.instrument_imports(include=["modelyard"]):
        law = getattr(importlib.import_module(module), test)
    atheris.Setup(sys.argv, law.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
