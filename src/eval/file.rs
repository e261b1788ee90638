//! Questions of the user's own: a JSON object a line.

use std::path::Path;

use serde_json::{Map, Value};

use super::longbench::Dataset;
use super::{EvalError, Key, Question, Scoring};
use crate::messages::json_problem;
use crate::model::json::shown;
use crate::utf8;

/// A question of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct FileQuestion {
    /// Its task: the field `task` or `dataset`, else the file's name.
    pub task: String,
    /// What is asked.
    pub question: Question,
    /// The classes there are, for [`Scoring::Classification`].
    pub classes: Vec<String>,
    /// Whether it goes through the model's chat template.
    pub chat: bool,
    /// Whether only the first line of an answer counts.
    first_line: bool,
    /// Its line in the file, from 1.
    pub line: usize,
}

impl FileQuestion {
    /// An answer's score, and whether it is exactly right.
    pub fn score(&self, prediction: &str) -> (f64, bool) {
        let prediction = match self.first_line {
            true => prediction.trim_start_matches('\n').lines().next().unwrap_or(""),
            false => prediction,
        };
        let (scoring, key) =
            (self.question.scoring, Key { references: &self.question.references, classes: &self.classes });
        (scoring.score(prediction, key), scoring.is_exact(prediction, key))
    }
}

/// Tokens of an answer, where the file does not say.
const ANSWER_TOKENS: usize = 128;

/// Reads a file of questions. Its lines have these fields; others are passed over.
///
/// | field | content |
/// |---|---|
/// | `context` | what is read; may be left out |
/// | `question`, or `input` | what is asked behind it |
/// | `answers`, `answer` or `outputs` | the references: a string or a list of strings |
/// | `task`, or `dataset` | a name for the table; of LongBench's datasets it also says how to ask and to score |
/// | `scoring` | `contains` (the default), `whole`, `first_number`, `f1`, `rouge_l`, `classification`, `number`, `code` |
/// | `all_classes` | the classes, for `classification` |
/// | `answer_prefix` | how the answer begins |
/// | `max_tokens` | tokens of an answer, 128 unless said |
///
/// # Errors
/// A file that cannot be read or is empty, or a line that is no such object, with the line and the field.
pub fn read_questions(path: &Path) -> Result<Vec<FileQuestion>, EvalError> {
    let unusable = |reason: String| EvalError::File { path: path.to_path_buf(), reason };
    let text = utf8::read(path).map_err(|error| unusable(error.to_string()))?;
    let name = path.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let mut questions = Vec::new();
    for (index, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let line = index + 1;
        let wrong = |problem: String| EvalError::Line { path: path.to_path_buf(), line, problem };
        let no_json = |error| wrong(format!("no JSON: {}", json_problem(&error)));
        let fields: Value = serde_json::from_str(text).map_err(no_json)?;
        let Value::Object(fields) = fields else {
            return Err(wrong("a JSON object is wanted, with a question and its answers".to_owned()));
        };
        questions.push(question(&Fields(&fields), &name, line).map_err(wrong)?);
    }
    if questions.is_empty() {
        return Err(unusable("there are no questions in it: a JSON object a line is wanted".to_owned()));
    }
    Ok(questions)
}

fn question(fields: &Fields<'_>, file: &str, line: usize) -> Result<FileQuestion, String> {
    let dataset_name = fields.text("dataset")?;
    let dataset = dataset_name.and_then(Dataset::from_name);
    let task = fields.text("task")?.or(dataset_name).unwrap_or(file).to_owned();
    let context = fields.text("context")?.unwrap_or_default();
    let asked = match fields.text("question")? {
        Some(question) => question,
        None => fields.text("input")?.unwrap_or_default(),
    };
    if context.trim().is_empty() && asked.trim().is_empty() {
        return Err("there is nothing to read: give `context`, and `question` or `input`".to_owned());
    }
    let mut references = None;
    for name in ["answers", "answer", "outputs"] {
        references = references.or(fields.texts(name)?);
    }
    let Some(references) = references.filter(|references| !references.is_empty()) else {
        return Err(
            "there is nothing to hold an answer against: give `answers`, a list of strings".to_owned()
        );
    };
    let scoring = match fields.0.get("scoring") {
        None => dataset.map_or(Scoring::Contains, |dataset| dataset.scoring),
        Some(name) => serde_json::from_value(name.clone()).map_err(|error| format!("`scoring`: {error}"))?,
    };
    let classes = fields.texts("all_classes")?.unwrap_or_default();
    if scoring == Scoring::Classification && classes.is_empty() {
        return Err(
            "`all_classes` is wanted, a list of strings: the answers are scored as classes".to_owned()
        );
    }
    let answer_tokens = match fields.0.get("max_tokens") {
        None => dataset.map_or(ANSWER_TOKENS, |dataset| dataset.answer_tokens),
        Some(number) => number
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .filter(|number| (1..=1 << 20).contains(number))
            .ok_or_else(|| format!("`max_tokens` is {number}: give a number of tokens, 1 or more"))?,
    };
    let instruction = dataset.map_or("", |dataset| dataset.instruction);
    let parts = [instruction, context].into_iter().filter(|part| !part.is_empty());
    let prefix = match fields.text("answer_prefix")? {
        Some(prefix) => prefix,
        None => dataset.map_or("", |dataset| dataset.prefix),
    };
    let question = Question {
        context: parts.collect::<Vec<_>>().join("\n"),
        question: asked.to_owned(),
        prefix: prefix.to_owned(),
        separator: "\n",
        references,
        depth: None,
        needle: None,
        scoring,
        answer_tokens,
    };
    let (chat, first_line) = dataset.map_or((true, false), |dataset| (dataset.chat, dataset.first_line));
    Ok(FileQuestion { task, question, classes, chat, first_line, line })
}

struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn text(&self, name: &str) -> Result<Option<&'a str>, String> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(format!("`{name}` is {}: a string is wanted", shown(other))),
        }
    }

    fn texts(&self, name: &str) -> Result<Option<Vec<String>>, String> {
        let wanted = |value: &Value| format!("`{name}` holds {}: strings are wanted", shown(value));
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(vec![text.clone()])),
            Some(Value::Array(values)) => {
                let texts =
                    values.iter().map(|value| value.as_str().map(str::to_owned).ok_or_else(|| wanted(value)));
                texts.collect::<Result<_, _>>().map(Some)
            }
            Some(other) => Err(wanted(other)),
        }
    }
}
