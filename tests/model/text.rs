//! Tokenizers and chat templates against transformers, and files that are wrong.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use fastkv::model::{ChatMessage, ChatTemplate, ModelError, Tokenizer};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{assert_refused, fixture_dirs, fixtures, read_json};

fn tokenizer_dir() -> PathBuf {
    fixtures().join("tokenizers/byte-level")
}

fn tokenizer() -> &'static Tokenizer {
    static READ: OnceLock<Tokenizer> = OnceLock::new();
    READ.get_or_init(read_tokenizer)
}

fn read_tokenizer() -> Tokenizer {
    let size =
        read_json(&tokenizer_dir().join("expected.json"))["vocab_size"].as_u64().expect("a size") as usize;
    Tokenizer::from_file(&tokenizer_dir().join("tokenizer.json"), size)
        .unwrap_or_else(|error| panic!("{error}"))
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn encodes_and_decodes_as_transformers_does() {
    let tokenizer = tokenizer();
    for case in read_json(&tokenizer_dir().join("expected.json"))["cases"].as_array().expect("cases") {
        let text = case["text"].as_str().expect("a text");
        let expected = ids(&case["ids"]);
        assert_eq!(tokenizer.encode(text, false).expect("encodes"), expected, "{text:?}");
        assert_eq!(
            tokenizer.encode(text, true).expect("encodes"),
            ids(&case["ids_with_special"]),
            "{text:?}"
        );
        assert_eq!(tokenizer.decode(&expected, false).expect("decodes"), case["decoded"], "{text:?}");
        assert_eq!(
            tokenizer.decode(&expected, true).expect("decodes"),
            case["decoded_without_special"],
            "{text:?}"
        );
        for skip in [false, true] {
            assert_eq!(
                streamed(tokenizer, &expected, skip),
                tokenizer.decode(&expected, skip).expect("decodes")
            );
        }
    }
    assert_eq!(tokenizer.token_id("<|end|>"), Some(1));
    assert_eq!(tokenizer.token(1).as_deref(), Some("<|end|>"));
    assert_eq!(tokenizer.token_id("<|nope|>"), None);
    assert!(tokenizer.is_special(1));
    assert!(!tokenizer.is_special(tokenizer.token_id("<tool>").expect("added")));
}

#[test]
fn offsets_are_the_bytes_of_each_token() {
    let tokenizer = tokenizer();
    for text in ["The quick 東京 <|end|>", "is 1234567.\n\ta-b", ""] {
        let (ids, offsets) = tokenizer.encode_with_offsets(text, true).expect("encodes");
        assert_eq!(ids, tokenizer.encode(text, true).expect("encodes"));
        assert_eq!((ids.len(), &offsets[0]), (offsets.len(), &(0..0)), "a token in front has no bytes");
        for (id, bytes) in ids.iter().zip(&offsets).skip(1) {
            let piece = tokenizer.decode(&[*id], false).expect("decodes");
            // A token of some bytes of a character has all of that one's.
            if !piece.contains(char::REPLACEMENT_CHARACTER) {
                assert_eq!(text[bytes.clone()], piece);
            }
        }
        assert_eq!(offsets.last().map_or(0, |bytes| bytes.end), text.len());
    }
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special_tokens: bool) -> String {
    let mut stream = tokenizer.stream(skip_special_tokens);
    let mut text = String::new();
    for id in ids {
        text.push_str(&stream.push(*id).expect("decodes"));
    }
    text.push_str(&stream.finish().expect("decodes"));
    text
}

#[test]
fn a_stream_gives_whole_characters_as_soon_as_they_are_whole() {
    let tokenizer = tokenizer();
    let fox = tokenizer.encode("a🦊b", false).expect("encodes");
    assert!(fox.len() >= 5, "the fox is several tokens: {fox:?}");
    let mut stream = tokenizer.stream(true);
    let pieces: Vec<String> = fox.iter().map(|id| stream.push(*id).expect("decodes")).collect();
    assert_eq!(pieces.first().map(String::as_str), Some("a"));
    assert_eq!(pieces.last().map(String::as_str), Some("b"));
    assert!(pieces[1..pieces.len() - 2].iter().all(String::is_empty), "{pieces:?}");
    assert_eq!(pieces[pieces.len() - 2], "🦊");

    // Cut in the middle: nothing of it until the end, then the mark of something lost.
    let mut stream = tokenizer.stream(true);
    let pieces: String = fox[..3].iter().map(|id| stream.push(*id).expect("decodes")).collect();
    assert_eq!(pieces, "a");
    assert_eq!(stream.finish().expect("decodes"), "\u{fffd}");
    assert_eq!(tokenizer.stream(true).finish().expect("decodes"), "");

    // A special token left out does not disturb the character around it.
    let mut stream = tokenizer.stream(true);
    let end = tokenizer.token_id("<|end|>").expect("special");
    let text: String =
        [&fox[..2], &[end], &fox[2..]].concat().iter().map(|id| stream.push(*id).expect("decodes")).collect();
    assert_eq!(text, "a🦊b");
}

#[test]
fn a_stream_of_garbage_goes_on_and_ends() {
    let tokenizer = tokenizer();
    // A continuation byte can never begin a character.
    let stray = *tokenizer.encode("🦊", false).expect("encodes").last().expect("an id");
    assert!(tokenizer.decode(&[stray], false).expect("decodes").ends_with('\u{fffd}'));
    let many = vec![stray; 1000];
    let mut stream = tokenizer.stream(false);
    let pieces = many.iter().filter(|id| !stream.push(**id).expect("decodes").is_empty()).count();
    assert!(pieces > 5, "something is shown on the way");
    assert_eq!(streamed(tokenizer, &many, false), tokenizer.decode(&many, false).expect("decodes"));
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    let file = tokenizer_dir().join("tokenizer.json");
    assert_refused(
        Tokenizer::from_file(&file, 340),
        &["tokenizer.json", "<tool>", "id 340", "vocab_size = 340"],
    );
    let directory = TempDir::new().expect("temporary directory");
    let other = directory.path().join("tokenizer.json");
    assert_refused(Tokenizer::from_file(&other, 1000), &["tokenizer.json", "no such file"]);
    let good = fs::read_to_string(&file).expect("readable");
    for text in ["", "{}", "[]", "\u{0}", &good[..good.len() / 2]] {
        fs::write(&other, text).expect("written");
        assert_refused(Tokenizer::from_file(&other, 1000), &["tokenizer.json", "not "]);
    }
    fs::write(&other, good.replace("\"BPE\"", "\"Abacus\"")).expect("written");
    assert_refused(Tokenizer::from_file(&other, 1000), &["tokenizer.json", "not a tokenizer"]);
    let mut odd: Value = serde_json::from_str(&good).expect("JSON");
    odd["decoder"] = json!(3);
    fs::write(&other, odd.to_string()).expect("written");
    assert_refused(Tokenizer::from_file(&other, 1000), &["tokenizer.json", "not a tokenizer"]);
    let mut empty: Value = serde_json::from_str(&good).expect("JSON");
    empty["model"]["vocab"] = json!({});
    empty["model"]["merges"] = json!([]);
    empty["added_tokens"] = json!([]);
    fs::write(&other, empty.to_string()).expect("written");
    assert_refused(Tokenizer::from_file(&other, 1000), &["tokenizer.json", "empty"]);
}

fn messages(value: &Value) -> Vec<ChatMessage> {
    let message = |value: &Value| {
        ChatMessage::new(
            value["role"].as_str().expect("a role"),
            value["content"].as_str().expect("a content"),
        )
    };
    value.as_array().expect("messages").iter().map(message).collect()
}

#[test]
fn templates_render_as_transformers_does() {
    for directory in fixture_dirs("templates") {
        let template = ChatTemplate::from_directory(&directory).unwrap_or_else(|error| panic!("{error}"));
        let template = template.expect("there is a template");
        for case in read_json(&directory.join("expected.json")).as_array().expect("cases") {
            let mut variables = Map::new();
            if let Some(tools) = case.get("tools") {
                variables.insert("tools".to_owned(), tools.clone());
            }
            let prompt = case["add_generation_prompt"].as_bool().expect("a switch");
            let rendered = template.render_with(&messages(&case["messages"]), prompt, &variables);
            match case.get("text") {
                Some(text) => {
                    let rendered = rendered.unwrap_or_else(|error| panic!("{error}"));
                    assert_eq!(rendered, text.as_str().expect("a text"), "{}", directory.display());
                }
                None => assert_refused(rendered, &["line ", case["error"].as_str().expect("an error")]),
            }
        }
    }
}

fn template_of(config: &Value) -> Result<Option<ChatTemplate>, ModelError> {
    let directory = TempDir::new().expect("temporary directory");
    fs::write(directory.path().join("tokenizer_config.json"), config.to_string()).expect("written");
    ChatTemplate::from_directory(directory.path())
}

fn render(template: &str) -> Result<String, ModelError> {
    let template = template_of(&json!({"chat_template": template, "bos_token": "<s>"}))?.expect("a template");
    template.render(&[ChatMessage::new("user", "hello")], true)
}

#[test]
fn other_messages_and_variables_reach_the_template() {
    let template = template_of(&json!({
        "chat_template": "{{ messages[0].parts | join('+') }} {{ date }} {{ bos_token }} {{ eos_token is defined }}",
        "bos_token": "<s>",
    }));
    let template = template.expect("valid").expect("there");
    let mut variables = Map::new();
    variables.insert("date".to_owned(), json!("today"));
    variables.insert("bos_token".to_owned(), json!("<other>"));
    let messages = [json!({"role": "user", "parts": ["a", "b"]})];
    assert_eq!(
        template.render_with(&messages, false, &variables).expect("renders"),
        "a+b today <other> False"
    );
    let today = render("{{ strftime_now('%Y-%m-%d') }}").expect("renders");
    assert!(today.len() == 10 && today.as_str() > "2024-01-01", "{today}");
    assert_eq!(render("{{ {'ü': 1} | tojson(ensure_ascii=true) }}").expect("renders"), "{\"\\u00fc\": 1}");
}

#[test]
fn broken_templates_are_refused_with_the_line() {
    assert_refused(render("one\n{% if x %}\n{{ }}"), &["tokenizer_config.json", "line 3"]);
    assert_refused(render("{% for m in messages %}"), &["line 1"]);
    assert_refused(render("\n\n{{ messages | nonsense }}"), &["line 3", "nonsense"]);
    assert_refused(render("\n{{ nonsense.field.deeper }}"), &["line 2", "undefined"]);
    assert_refused(render("\n{{ raise_exception('only in pairs') }}"), &["line 2: only in pairs"]);
    assert_refused(render("{{ strftime_now('%Q') }}"), &["strftime_now", "%Q"]);
    assert_refused(render("{{ messages | tojson(colour=1) }}"), &["line 1", "colour"]);
    assert_refused(render("{% include 'other' %}"), &["line 1", "other"]);
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}";
    assert_refused(render(endless), &["fuel"]);
    assert_refused(render(&"{{ (".repeat(50_000)), &["line 1"]);
    assert_refused(render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), &["line 1"]);
}

#[test]
fn broken_tokenizer_configs_are_refused() {
    assert!(template_of(&json!({})).expect("valid").is_none());
    assert!(template_of(&json!({"chat_template": null, "bos_token": null})).expect("valid").is_none());
    for template in [
        json!(3),
        json!({"default": "x"}),
        json!([]),
        json!([{"name": "tool_use", "template": "x"}]),
        json!([{"name": "default"}]),
        json!(["default"]),
    ] {
        let config = json!({"chat_template": template});
        assert_refused(template_of(&config), &["tokenizer_config.json", "chat_template", "default"]);
    }
    for token in [json!(1), json!({}), json!({"content": 3}), json!(["<s>"])] {
        let config = json!({"chat_template": "x", "bos_token": token});
        assert_refused(template_of(&config), &["tokenizer_config.json", "bos_token", &token.to_string()]);
    }
    let directory = TempDir::new().expect("temporary directory");
    fs::write(directory.path().join("tokenizer_config.json"), "{").expect("written");
    assert_refused(ChatTemplate::from_directory(directory.path()), &["tokenizer_config.json", "JSON"]);
    let directory = TempDir::new().expect("temporary directory");
    fs::write(directory.path().join("chat_template.jinja"), [0xff, 0xfe]).expect("written");
    assert_refused(ChatTemplate::from_directory(directory.path()), &["chat_template.jinja", "UTF-8"]);
}

/// Reads a damaged tokenizer and, if that works, uses it.
fn try_tokenizer(text: &[u8]) {
    let directory = TempDir::new().expect("temporary directory");
    let file = directory.path().join("tokenizer.json");
    fs::write(&file, text).expect("written");
    if let Ok(tokenizer) = Tokenizer::from_file(&file, 1000)
        && let Ok(ids) = tokenizer.encode("The quick 東京 <|end|>", true)
    {
        let _ = tokenizer.decode(&ids, false);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_tokens_stream_as_they_decode(ids in prop::collection::vec(0_u32..345, 0..60), skip: bool) {
        let tokenizer = tokenizer();
        prop_assert_eq!(streamed(tokenizer, &ids, skip), tokenizer.decode(&ids, skip).expect("decodes"));
    }

    #[test]
    fn any_text_comes_back(text in "\\PC{0,40}") {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode(&text, false).expect("encodes");
        prop_assert_eq!(tokenizer.decode(&ids, false).expect("decodes"), text);
    }

    #[test]
    fn a_changed_tokenizer_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut text = fs::read(tokenizer_dir().join("tokenizer.json")).expect("readable");
        for (at, byte) in changes {
            let at = at.index(text.len());
            text[at] = byte;
        }
        try_tokenizer(&text);
    }

    #[test]
    fn odd_values_in_a_tokenizer_never_panic(
        field in prop::sample::select(vec!["/decoder", "/model", "/model/type", "/model/vocab", "/model/merges",
            "/model/merges/0", "/model/unk_token", "/model/byte_fallback", "/pre_tokenizer", "/pre_tokenizer/type",
            "/post_processor", "/post_processor/single", "/post_processor/special_tokens", "/added_tokens",
            "/added_tokens/0/id", "/added_tokens/0/content", "/truncation", "/truncation/max_length", "/padding",
            "/normalizer", "/version"]),
        value in prop::sample::select(vec![json!(null), json!(3), json!(-1), json!(""), json!("BPE"), json!([]),
            json!({}), json!([["a", "b"]]), json!({"type": "Sequence"}), json!({"a": 0}), json!(1e300), json!(true),
            json!({"type": "Split", "pattern": {"Regex": "(a+)+$("}, "behavior": "Isolated", "invert": false})]),
    ) {
        let mut changed = read_json(&tokenizer_dir().join("tokenizer.json"));
        *changed.pointer_mut(field).expect("the field is there") = value;
        try_tokenizer(changed.to_string().as_bytes());
    }

    #[test]
    fn any_template_is_answered(template in "(\\{\\{|\\}\\}|\\{%|%\\}|-|if |for m in messages|endfor|endif|messages|\\.role|\\[0\\]| |\\||tojson|'x'|\n){0,20}") {
        let _ = render(&template);
    }
}

#[test]
fn the_unknown_token_is_told() {
    assert_eq!(tokenizer().unknown(), None, "bytes can all be written");
    let mut file = read_json(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/needle/tokenizer.json"));
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tokenizer.json");
    let unknown = |file: &Value| {
        fs::write(&path, file.to_string()).expect("writable");
        Tokenizer::from_file(&path, 384).unwrap_or_else(|error| panic!("{error}")).unknown()
    };
    assert_eq!(unknown(&file), Some(1));
    file["model"] =
        json!({ "type": "Unigram", "unk_id": 2, "vocab": [["<s>", 0.0], ["a", -1.0], ["<unk>", 0.0]] });
    file["added_tokens"] = json!([]);
    file["post_processor"] = Value::Null;
    assert_eq!(unknown(&file), Some(2));
}
