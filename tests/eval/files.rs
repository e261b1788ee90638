//! Questions of the user's own.

use fastkv::eval::{EvalError, FileQuestion, Scoring, read_questions};

fn read(text: &str) -> Result<Vec<FileQuestion>, EvalError> {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("mine.jsonl");
    std::fs::write(&file, text).expect("writable");
    read_questions(&file)
}

#[test]
fn plain_lines_are_questions() {
    let text = "{\"context\": \"c\", \"question\": \"q\", \"answers\": [\"a\", \"b\"], \"more\": 1}\n\n\
                {\"input\": \"all of it\", \"outputs\": \"x\", \"answer_prefix\": \"It is\", \"max_tokens\": 9, \
                 \"task\": \"other\", \"scoring\": \"first_number\"}\n";
    let questions = read(text).expect("questions");
    let [first, second] = questions.as_slice() else { panic!("{questions:?}") };
    assert_eq!((first.task.as_str(), first.line, first.chat), ("mine", 1, true));
    assert_eq!(first.question.text(), "c\nq");
    assert_eq!((first.question.scoring, first.question.answer_tokens), (Scoring::Contains, 128));
    assert_eq!(first.score("only B"), (50.0, false));
    assert_eq!(first.score("b, a."), (100.0, true));
    assert_eq!((second.task.as_str(), second.line), ("other", 3));
    assert_eq!(second.question.text(), "all of it\nIt is");
    assert_eq!((second.question.scoring, second.question.answer_tokens), (Scoring::FirstNumber, 9));
}

/// One line of LongBench.
fn longbench(dataset: &str, input: &str, answers: &str, classes: &str) -> FileQuestion {
    let text = format!(
        "{{\"input\": \"{input}\", \"context\": \"Some text.\", \"answers\": {answers}, \"length\": 2, \
          \"dataset\": \"{dataset}\", \"language\": \"en\", \"all_classes\": {classes}, \"_id\": \"7\"}}"
    );
    read(&text).expect("a question").remove(0)
}

#[test]
fn datasets_of_longbench_are_scored_their_way() {
    let qa = longbench("hotpotqa", "Who?", "[\"the red fox\", \"fox\"]", "null");
    assert_eq!(
        (qa.task.as_str(), qa.question.scoring, qa.question.answer_tokens),
        ("hotpotqa", Scoring::F1, 32)
    );
    assert!(qa.question.text().contains("Some text.\nWho?\nAnswer:"), "{}", qa.question.text());
    assert_eq!(qa.score("A fox.").0, 100.0);
    assert_eq!(qa.score("Red dog").0, 50.0);
    let easy = longbench("qasper_e", "Who?", "[\"fox\"]", "null");
    assert_eq!(easy.question.scoring, Scoring::F1, "LongBench-E's");

    let trec = longbench("trec", "Question: x\\nType:", "[\"Date\"]", "[\"Date\", \"City\"]");
    assert!(!trec.chat && trec.question.text().ends_with("Type:"));
    assert_eq!(trec.score("\nDate\nCity\n").0, 100.0, "the first line counts");
    assert_eq!(trec.score("Date City").0, 50.0);

    let summary = longbench("gov_report", "", "[\"one two three four\"]", "null");
    assert_eq!((summary.question.scoring, summary.question.answer_tokens), (Scoring::RougeL, 512));
    assert!((summary.score("one three").0 - 100.0 * 2.0 * 2.0 / 6.0).abs() < 1e-9);

    assert_eq!(longbench("passage_count", "", "[\"12\"]", "null").score("12 or 13").0, 50.0);
    let retrieval = longbench("passage_retrieval_en", "a summary", "[\"Paragraph 5\"]", "null");
    assert_eq!(retrieval.score("Paragraph 5").0, 100.0);
    assert_eq!(retrieval.score("Paragraph 15").0, 0.0);
    assert_eq!(longbench("lcc", "", "[\"return x\"]", "null").score("// so\nreturn x\nend").0, 100.0);
}

#[test]
fn lines_that_are_no_questions_are_named() {
    let good = "{\"question\": \"q\", \"answers\": \"a\"}";
    for (line, parts) in [
        ("{\"question\": \"q\"", &["no JSON"][..]),
        ("[1]", &["a JSON object"]),
        ("{\"answers\": [\"a\"]}", &["`context`", "`question`"]),
        ("{\"question\": \"q\"}", &["`answers`"]),
        ("{\"question\": \"q\", \"answers\": []}", &["`answers`"]),
        ("{\"question\": 5, \"answers\": \"a\"}", &["`question` is 5", "a string"]),
        ("{\"question\": \"q\", \"answers\": [\"a\", 7]}", &["`answers` holds 7", "strings"]),
        (
            "{\"question\": \"q\", \"answers\": \"a\", \"scoring\": \"bleu\"}",
            &["`scoring`", "bleu", "rouge_l"],
        ),
        ("{\"question\": \"q\", \"answers\": \"a\", \"max_tokens\": 0}", &["`max_tokens` is 0"]),
        ("{\"input\": \"q\", \"answers\": \"a\", \"dataset\": \"trec\"}", &["`all_classes`"]),
    ] {
        let error = read(&format!("{good}\n{line}\n")).expect_err(line).to_string();
        for part in ["mine.jsonl, line 2"].iter().chain(parts) {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
    }
    let error = read("\n\n").expect_err("empty").to_string();
    assert!(error.contains("mine.jsonl: there are no questions"), "{error}");
}
