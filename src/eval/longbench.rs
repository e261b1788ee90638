//! The datasets of LongBench (arXiv 2308.14508) by name: how their answers are scored, how long these may
//! be, and what is asked. The instructions are this crate's own words.

use super::Scoring;

/// How a dataset is asked and scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dataset {
    name: &'static str,
    pub(super) scoring: Scoring,
    pub(super) answer_tokens: usize,
    /// In front of the context.
    pub(super) instruction: &'static str,
    /// Behind the question.
    pub(super) prefix: &'static str,
    /// Few-shot prompts and code go on by themselves, without a chat template.
    pub(super) chat: bool,
    /// Whether only the first line of an answer counts.
    pub(super) first_line: bool,
}

impl Dataset {
    /// The dataset of a name; LongBench-E's end in `_e`.
    pub(super) fn from_name(name: &str) -> Option<&'static Self> {
        let name = name.strip_suffix("_e").unwrap_or(name);
        DATASETS.iter().find(|dataset| dataset.name == name)
    }
}

const fn asked(
    name: &'static str,
    scoring: Scoring,
    answer_tokens: usize,
    instruction: &'static str,
) -> Dataset {
    Dataset { name, scoring, answer_tokens, instruction, prefix: "Answer:", chat: true, first_line: false }
}

const fn continued(
    name: &'static str,
    scoring: Scoring,
    answer_tokens: usize,
    instruction: &'static str,
    first_line: bool,
) -> Dataset {
    Dataset { name, scoring, answer_tokens, instruction, prefix: "", chat: false, first_line }
}

const QUESTION: &str =
    "Answer the question about the text below in as few words as you can, and write nothing else.";
const SUMMARY: &str = "Summarise the text below.";
const QUERY: &str = "Read the transcript below and answer what is asked about it in a few sentences.";
const EXAMPLES: &str = "Go on as in the examples below.";
const CODE: &str = "Write the next line of the code below.";
const COUNT: &str = "Some of the paragraphs below are repeated. Count how many different ones there are, and answer with the number alone.";
const RETRIEVAL: &str =
    "Below are numbered paragraphs, and then a summary of one of them. Say which one it is of.";

const DATASETS: [Dataset; 21] = [
    asked("narrativeqa", Scoring::F1, 128, QUESTION),
    asked("qasper", Scoring::F1, 128, QUESTION),
    asked("multifieldqa_en", Scoring::F1, 64, QUESTION),
    asked("multifieldqa_zh", Scoring::F1, 64, QUESTION),
    asked("hotpotqa", Scoring::F1, 32, QUESTION),
    asked("2wikimqa", Scoring::F1, 32, QUESTION),
    asked("musique", Scoring::F1, 32, QUESTION),
    asked("dureader", Scoring::RougeL, 128, QUESTION),
    asked("gov_report", Scoring::RougeL, 512, SUMMARY),
    asked("qmsum", Scoring::RougeL, 512, QUERY),
    asked("multi_news", Scoring::RougeL, 512, SUMMARY),
    asked("vcsum", Scoring::RougeL, 512, SUMMARY),
    continued("trec", Scoring::Classification, 64, EXAMPLES, true),
    continued("triviaqa", Scoring::F1, 32, EXAMPLES, true),
    continued("samsum", Scoring::RougeL, 128, EXAMPLES, true),
    continued("lsht", Scoring::Classification, 64, EXAMPLES, true),
    asked("passage_count", Scoring::Number, 32, COUNT),
    asked("passage_retrieval_en", Scoring::Number, 32, RETRIEVAL),
    asked("passage_retrieval_zh", Scoring::Number, 32, RETRIEVAL),
    continued("lcc", Scoring::Code, 64, CODE, false),
    continued("repobench-p", Scoring::Code, 64, CODE, false),
];
