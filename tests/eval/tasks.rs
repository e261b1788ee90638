//! Generated tasks, read and counted anew from their texts.

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use fastkv::eval::{Dialect, EvalError, NeedlePrompt, Prose, Question, Scoring, Size, Task};

/// A token for each word and mark, as far as these tests count.
fn tokens(question: &Question) -> usize {
    let text = question.text();
    let is_mark = |char: &char| char.is_ascii_punctuation();
    text.split_whitespace().map(|word| 1 + word.chars().filter(is_mark).count()).sum()
}

fn measure(question: &Question) -> Result<usize, EvalError> {
    Ok(tokens(question))
}

fn task(name: &str) -> Task {
    Task::from_name(name).unwrap_or_else(|| panic!("there is no {name}"))
}

fn question_at(name: &str, length: usize, seed: u64, depth: f64) -> Question {
    let prose = Prose::default();
    let size = Size::find(task(name), length, &prose, &measure).expect("a size");
    size.question(&prose, seed, depth, &measure).expect("a question")
}

fn question(name: &str, length: usize, seed: u64) -> Question {
    question_at(name, length, seed, 0.5)
}

#[test]
fn prompts_fill_their_lengths_and_are_functions_of_the_seed() {
    for task in Task::ALL {
        let name = task.name();
        for length in [4096, 9000] {
            let first = question(name, length, 1);
            for seed in 1..5 {
                let question = question(name, length, seed);
                let all = tokens(&question) + question.answer_tokens;
                assert!(all <= length && all + length / 20 > length, "{name}: {all} of {length}");
                assert_eq!(question.answer_tokens, task.answer_tokens());
                assert!(!question.references.is_empty() && !question.prefix.is_empty());
                for reference in &question.references {
                    assert!(question.context.contains(reference), "{name}: {reference} is not there");
                    assert!(!question.question.contains(reference) && !question.prefix.contains(reference));
                }
                assert_eq!(question == first, seed == 1, "{name}");
            }
            assert_eq!(question(name, length, 1), first);
        }
    }
}

#[test]
fn one_unit_more_would_not_fit() {
    let prose = Prose::default();
    for (name, unit) in [("single_1", 7), ("multikey_2", 12), ("key_value", 20), ("passkey", 7)] {
        let all = tokens(&question(name, 3000, 0)) + task(name).answer_tokens();
        assert!(all + unit > 3000, "{name}: {all}");
    }
    // Whatever the answers of the measure: what is found fits.
    for per_unit in [1, 3, 1000] {
        let lumpy = |question: &Question| Ok(tokens(question).div_ceil(per_unit) * per_unit);
        let size = Size::find(task("single_2"), 2500, &prose, &lumpy).expect("a size");
        let question = size.question(&prose, 9, 0.5, &lumpy).expect("a question");
        assert!(lumpy(&question).expect("counted") + question.answer_tokens <= 2500);
    }
}

/// Key and value of every needle.
fn needles(question: &Question) -> Vec<(String, String)> {
    let parts = question.context.split("Remember that the secret ").skip(1);
    parts
        .map(|part| {
            let (_, rest) = part.split_once(" of ").expect("a kind");
            let (key, rest) = rest.split_once(" is ").expect("a key");
            (key.to_owned(), rest.split_once('.').expect("a value").0.to_owned())
        })
        .collect()
}

#[test]
fn needles_are_as_many_and_as_unlike_as_the_variant_says() {
    // Needles that are hidden in prose or noise, their keys, and those that are asked for.
    let variants = [
        ("single_1", 1, 1, 1),
        ("single_2", 1, 1, 1),
        ("single_3", 1, 1, 1),
        ("multikey_1", 4, 4, 1),
        ("multivalue", 4, 1, 1),
        ("multiquery", 4, 4, 4),
    ];
    for seed in 0..6 {
        for (name, hidden, keys, asked) in variants {
            let question = question(name, 4096, seed);
            let needles = needles(&question);
            assert_eq!(needles.len(), hidden, "{name}");
            let distinct: HashSet<&String> = needles.iter().map(|(key, _)| key).collect();
            assert_eq!(distinct.len(), keys, "{name}");
            check_asked(&question, &needles, asked);
            assert_eq!(question.depth.is_some(), hidden == 1);
        }
        for name in ["multikey_2", "multikey_3"] {
            let question = question(name, 4096, seed);
            let needles = needles(&question);
            assert!(needles.len() > 100, "{name}: {}", needles.len());
            let distinct: HashSet<&String> = needles.iter().flat_map(|(key, value)| [key, value]).collect();
            assert_eq!(distinct.len(), 2 * needles.len());
            check_asked(&question, &needles, 1);
            let place =
                needles.iter().position(|(_, value)| *value == question.references[0]).expect("there");
            assert_eq!(question.depth, Some(place as f64 / (needles.len() - 1) as f64));
        }
    }
}

/// The references are the values of the keys in the question, and of no others.
fn check_asked(question: &Question, needles: &[(String, String)], asked: usize) {
    let right: Vec<&(String, String)> = needles
        .iter()
        .filter(|(key, _)| question.question.contains(&format!(" {key}")) && question.prefix.contains(key))
        .collect();
    let keys: HashSet<&String> = right.iter().map(|(key, _)| key).collect();
    assert_eq!(keys.len(), asked, "{}", question.question);
    let values: HashSet<&String> = right.iter().map(|(_, value)| value).collect();
    assert_eq!(values, question.references.iter().collect());
}

#[test]
fn values_are_of_their_kind() {
    let is_number = |text: &str| text.len() == 7 && text.chars().all(|char| char.is_ascii_digit());
    let is_uuid = |text: &str| text.len() == 36 && text.split('-').count() == 5;
    for (key, value) in needles(&question("multikey_3", 4096, 3)) {
        assert!(is_uuid(&key) && is_uuid(&value));
    }
    for (key, value) in needles(&question("multikey_2", 4096, 3)) {
        assert!(key.split('-').count() == 2 && is_number(&value));
    }
    assert!(is_uuid(&question("single_3", 4096, 3).references[0]));
}

#[test]
fn needles_in_prose_stand_between_sentences_at_even_depths() {
    let mut depths = HashSet::new();
    for seed in 0..40 {
        let question = question("single_2", 4096, seed);
        let text = question.context.split_once('\n').expect("an instruction").1;
        let (before, after) = text.split_once("Remember that").expect("a needle");
        assert!(before.is_empty() || before.ends_with(['.', '!', '?', ' ']), "{before}");
        // Sentences of the prose that comes along end in full stops alone.
        let sentences = |text: &str| text.matches('.').count();
        let all = sentences(before) + sentences(after) - 1;
        let depth = question.depth.expect("one place");
        assert!((sentences(before) as f64 / all as f64 - depth).abs() < 1e-9, "{depth}");
        // 40 even percentages, brought down to whole sentences.
        let step = (0..40).any(|step| {
            let percent = (step as f64 * 100.0 / 39.0).round() as usize;
            all * percent / 100 == sentences(before)
        });
        assert!(step, "{depth}");
        depths.insert((depth * 1000.0) as u64);
    }
    assert!(depths.len() > 15, "they vary: {depths:?}");
}

#[test]
fn a_chain_of_five_names_holds_a_value() {
    for seed in 0..6 {
        let question = question("variable_tracking", 4096, seed);
        let assignments: Vec<(&str, &str)> = question
            .context
            .split("LET ")
            .skip(1)
            .map(|part| part.split_once('.').expect("an end").0.split_once(" = ").expect("a hop"))
            .collect();
        let (example, chain) = assignments.split_at(5);
        assert!(example.iter().all(|(name, _)| name.len() == 3));
        assert_eq!(chain.len(), 5);
        let value: usize = chain[0].1.parse().expect("a number");
        assert!((10_000..=99_998).contains(&value) && question.question.contains(chain[0].1));
        for pair in chain.windows(2) {
            assert_eq!(pair[1].1, pair[0].0, "each is set to the one before it");
        }
        let names: Vec<&str> = chain.iter().map(|(name, _)| *name).collect();
        assert_eq!(question.references, names);
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), 5);
        assert!(
            names.iter().all(|name| name.len() == 5 && name.chars().all(|char| char.is_ascii_uppercase()))
        );
        let end = question.context.rfind("Follow the names").expect("twice");
        assert!(tokens(&Question { context: question.context[..end].to_owned(), ..question.clone() }) < 500);
    }
}

#[test]
fn common_words_stand_as_often_as_they_should() {
    for (length, common, other) in [(8000, 30, 3), (4095, 6, 1)] {
        let question = question("common_words", length, 2);
        let lists = question.context.split("Below is a numbered list").skip(1);
        let counts: Vec<BTreeMap<&str, usize>> = lists
            .map(|list| {
                let entries: Vec<&str> = list.lines().nth(1).expect("a list").split(' ').collect();
                let mut counts = BTreeMap::new();
                for (index, entry) in entries.chunks_exact(2).enumerate() {
                    assert_eq!(entry[0], format!("{}.", index + 1));
                    *counts.entry(entry[1]).or_default() += 1;
                }
                counts
            })
            .collect();
        let often = |counts: &BTreeMap<&str, usize>, times: usize| {
            counts
                .iter()
                .filter(|(_, count)| **count == times)
                .map(|(word, _)| (*word).to_owned())
                .collect::<HashSet<_>>()
        };
        let [example, list] = counts.as_slice() else { panic!("{}", counts.len()) };
        assert_eq!((often(example, 10).len(), often(example, 3).len(), example.len()), (10, 30, 40));
        assert_eq!(often(list, common), question.references.iter().cloned().collect());
        assert_eq!(often(list, common).len() + often(list, other).len(), list.len());
        assert!(list.keys().all(|word| !example.contains_key(word)), "the example is no help");
    }
}

#[test]
fn frequent_words_fall_with_the_square_of_the_rank() {
    let question = question("frequent_words", 8000, 4);
    let text = question.context.lines().nth(1).expect("a text");
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    text.split(' ').for_each(|word| *counts.entry(word).or_default() += 1);
    let mut ranked: Vec<(&str, usize)> = counts.into_iter().collect();
    ranked.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    assert_eq!(ranked[0].0, "...");
    assert_eq!(question.references, ranked[1..4].iter().map(|(word, _)| *word).collect::<Vec<_>>());
    assert!(
        ranked[1..]
            .iter()
            .all(|(word, _)| word.len() == 6 && word.chars().all(|char| char.is_ascii_lowercase()))
    );
    // Some N gives all counts, words that stand no time left out.
    let zeta: f64 = (1..2_000_000).map(|k| 1.0 / (k as f64 * k as f64)).sum::<f64>() + 1.0 / 2_000_000.0;
    let expected =
        |n: usize| (1..=(8000 - 50) / 50).map(move |k| (n as f64 / (k * k) as f64 / zeta) as usize);
    let found: Vec<usize> = ranked.iter().map(|(_, count)| *count).collect();
    let fits = |n: &usize| expected(*n).filter(|count| *count > 0).eq(found.iter().copied());
    assert!((1000..30_000).any(|n| fits(&n)), "{found:?}");
}

#[test]
fn a_passkey_stands_where_its_depth_says() {
    for seed in 0..6 {
        let question = question("passkey", 4096, seed);
        let key: usize = question.references[0].parse().expect("a number");
        assert!((1..=50_000).contains(&key));
        let (before, after) = question.context.split_once("The pass key is").expect("a key");
        assert!(after.starts_with(&format!(" {key}.")));
        let sentences = |text: &str| text.matches(['.']).count();
        // Two sentences introduce, two state the key.
        let (before, after) = (sentences(before) - 2, sentences(after) - 2);
        assert_eq!(question.depth, Some(before as f64 / (before + after) as f64));
    }
}

#[test]
fn pairs_are_json() {
    let question = question("key_value", 4096, 1);
    let json = question.context.lines().nth(1).expect("an object");
    let pairs: BTreeMap<String, String> = serde_json::from_str(json).expect("JSON");
    assert_eq!(pairs.len(), json.matches("\": \"").count(), "no key twice");
    let asked = question.question.split('"').nth(1).expect("a key");
    assert_eq!(question.references, [pairs[asked].clone()]);
    let place = json.find(asked).expect("a pair") as f64 / json.len() as f64;
    assert!((question.depth.expect("a place") - place).abs() < 0.05);
}

#[test]
fn a_depth_map_plants_where_it_is_told() {
    for depth in [0.0, 0.25, 0.5, 1.0] {
        let question = question_at("depth_map", 4096, 1, depth);
        assert_eq!((question.depth, question.scoring), (Some(depth), Scoring::FirstNumber));
        let text = question.context.split_once('\n').expect("an instruction").1;
        let (before, after) = text.split_once("The number on the door of").expect("a needle");
        let sentences = |text: &str| text.matches('.').count() as f64;
        let share = sentences(before) / (sentences(before) + sentences(after) - 1.0);
        assert!((share - depth).abs() < 0.01, "{share} for {depth}");
    }
}

#[test]
fn a_needle_is_the_one_place_that_says_the_answer() {
    for task in Task::ALL {
        for seed in 0..5 {
            let Question { context, references, needle, depth, .. } = question(task.name(), 4096, seed);
            assert_eq!(needle.is_some(), task.has_needle(), "{task:?}");
            let Some(needle) = needle else { continue };
            let places: Vec<usize> = context.match_indices(&references[0]).map(|(place, _)| place).collect();
            assert_eq!((references.len(), places), (1, vec![needle.start]), "{task:?}");
            assert_eq!(context[needle.clone()], references[0]);
            if let Some(depth) = depth {
                let place = needle.start as f64 / context.len() as f64;
                assert!((place - depth).abs() < 0.1, "{task:?}: {place} for {depth}");
            }
        }
    }
    let names: Vec<&str> = Task::ALL.into_iter().filter(|task| !task.has_needle()).map(Task::name).collect();
    let without =
        ["multivalue", "multiquery", "variable_tracking", "common_words", "frequent_words", "passkey"];
    assert_eq!(names, without);
}

#[test]
fn a_dialects_needle_stands_in_the_sentence_that_is_asked_for() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/needle");
    let dialect = Dialect::from_directory(&model).expect("a dialect");
    for (seed, name) in (0..20).flat_map(|seed| [(seed, "single"), (seed, "hard")]) {
        let task = dialect.task(name).expect("a task");
        let prompt = NeedlePrompt::generate(&dialect, task, 300, seed).expect("a prompt");
        let Question { context, question, references, needle, .. } = prompt.into_question(8);
        let needle = needle.expect("one place");
        assert_eq!(context[needle.clone()], references[0]);
        let asked = question.strip_prefix("question : ").expect("a question");
        assert!(context[..needle.start].ends_with(&format!("{asked} ")), "{asked}: {needle:?}");
    }
}

#[test]
fn lengths_that_nothing_fits_are_refused() {
    let prose = Prose::default();
    for task in Task::ALL {
        let error = Size::find(task, 40, &prose, &measure).expect_err("too short");
        let EvalError::TooShort { length: 40, least, .. } = error else { panic!("{error}") };
        assert!(error.to_string().contains(task.name()), "{error}");
        let found = Size::find(task, least, &prose, &measure);
        assert!(found.is_ok() || task.name() == "frequent_words", "{task:?} at {least}: {found:?}");
    }
    // A sample that never fits is given up.
    let sized = Cell::new(false);
    let moody = |question: &Question| Ok(if sized.get() { 1 << 20 } else { tokens(question) });
    let size = Size::find(task("single_1"), 2000, &prose, &moody).expect("a size");
    sized.set(true);
    let error = size.question(&prose, 7, 0.5, &moody).expect_err("it never fits");
    assert!(matches!(error, EvalError::NothingFits { length: 2000, seed: 7, .. }), "{error}");
    // What the measure says goes up.
    let refuses = |_: &Question| Err(EvalError::Tokens("no such word".to_owned()));
    let error = Size::find(task("single_1"), 2000, &prose, &refuses).expect_err("it refuses");
    assert_eq!(error.to_string(), "no such word");
}

#[test]
fn needles_hide_in_the_users_own_text() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("text.txt");
    std::fs::write(&file, "Here is one. There is another!\n\nAnd a third?").expect("writable");
    let prose = Prose::from_file(&file).expect("prose");
    let size = Size::find(task("single_2"), 1000, &prose, &measure).expect("a size");
    let question = size.question(&prose, 0, 0.5, &measure).expect("a question");
    assert!(question.context.matches("There is another!").count() > 20);
    std::fs::write(&file, "One sentence alone.").expect("writable");
    let error = Prose::from_file(&file).expect_err("too little").to_string();
    assert!(error.contains("text.txt") && error.contains("two sentences"), "{error}");
    assert!(Prose::from_file(&directory.path().join("none.txt")).is_err());
}

/// Filler without words would never fill a prompt.
#[test]
fn dialects_without_words_are_refused() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/needle/dialect.json");
    let text = std::fs::read_to_string(model).expect("readable");
    let scratch = tempfile::tempdir().expect("a directory");
    let refused = |edit: &dyn Fn(&mut serde_json::Value), part: &str| {
        let mut dialect = serde_json::from_str(&text).expect("JSON");
        edit(&mut dialect);
        std::fs::write(scratch.path().join("dialect.json"), dialect.to_string()).expect("writable");
        let error = Dialect::from_directory(scratch.path()).expect_err("no words").to_string();
        assert!(error.contains(part) && error.contains("dialect.json"), "{error}");
    };
    refused(&|dialect| dialect["filler"][0]["templates"][1] = " ".into(), "the template \" \" holds no word");
    refused(&|dialect| dialect["words"]["place"][2] = "".into(), "{place} has a word that is blank");
}
