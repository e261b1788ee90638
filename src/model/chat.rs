//! Chat templates: messages to the text a chat model was trained on.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::{Map, Value as Json};

use super::ModelError;
use super::json::{self, Fields};

/// A message of a conversation. Templates that read more than these two fields take any other
/// serialisable type in its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`, as the template knows them.
    pub role: String,
    /// The text.
    pub content: String,
}

impl ChatMessage {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// The chat template of a model, compiled.
///
/// Templates are Jinja as transformers runs it: blocks trimmed, `raise_exception`, `strftime_now`
/// (here in UTC), `tojson` without HTML escapes, the methods of Python's strings and dicts.
#[derive(Debug)]
pub struct ChatTemplate {
    /// The file the template comes from.
    file: PathBuf,
    environment: Environment<'static>,
    /// `bos_token` and its like, for the template to place.
    special_tokens: Map<String, Json>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja` or, where there is none, `chat_template` of `tokenizer_config.json`;
    /// of several templates, the one called `default`. None where the model has no template.
    ///
    /// # Errors
    /// A file is unreadable or malformed, or the template does not parse.
    pub fn from_directory(directory: &Path) -> Result<Option<Self>, ModelError> {
        let config_file = directory.join("tokenizer_config.json");
        let config = match json::read(&config_file, "") {
            Ok(text) => json::object(&config_file, &text)?,
            Err(ModelError::FileMissing { .. }) => Map::new(),
            Err(error) => return Err(error),
        };
        let fields = Fields::new(&config_file, &config);
        let special_tokens = special_tokens(&fields)?;
        let own_file = directory.join("chat_template.jinja");
        let (file, source) = match json::read(&own_file, "") {
            Ok(text) => match String::from_utf8(text) {
                Ok(text) => (own_file, text),
                Err(error) => {
                    let reason = format!("not UTF-8: {error}");
                    return Err(ModelError::ChatTemplate { file: own_file, line: None, reason });
                }
            },
            Err(ModelError::FileMissing { .. }) => match default_template(&fields)? {
                Some(text) => (config_file.clone(), text.to_owned()),
                None => return Ok(None),
            },
            Err(error) => return Err(error),
        };
        Self::new(file, &source, special_tokens).map(Some)
    }

    /// The text of a conversation, special tokens and all: encode it without adding any again.
    ///
    /// `add_generation_prompt` ends it with the head of an assistant's message, for the model to go on.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`], with the line, where the template refuses the messages or runs
    /// into something undefined.
    pub fn render<M: Serialize>(
        &self,
        messages: &[M],
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        self.render_with(messages, add_generation_prompt, &Map::new())
    }

    /// As [`Self::render`], with more variables for the template, such as `tools` or `date_string`;
    /// they win over those that are there anyway.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_with<M: Serialize>(
        &self,
        messages: &[M],
        add_generation_prompt: bool,
        variables: &Map<String, Json>,
    ) -> Result<String, ModelError> {
        // What transformers always defines.
        let fixed = [
            ("messages", Value::from(Serde(messages))),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let mut context: std::collections::BTreeMap<&str, Value> = fixed.into_iter().collect();
        for (name, value) in self.special_tokens.iter().chain(variables) {
            context.insert(name, Value::from(Serde(value)));
        }
        self.environment
            .get_template(TEMPLATE)
            .and_then(|template| template.render(Value::from_pairs(context)))
            .map_err(|error| refused(&self.file, &error))
    }

    /// The file the template comes from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    fn new(file: PathBuf, source: &str, special_tokens: Map<String, Json>) -> Result<Self, ModelError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| refused(&file, &error))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
            strftime(format, now).map_err(|directive| {
                Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know `{directive}`"))
            })
        });
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(TEMPLATE, without_generation_tags(source))
            .map_err(|error| refused(&file, &error))?;
        Ok(Self { file, environment, special_tokens })
    }
}

const TEMPLATE: &str = "chat";

/// Steps a template may take: tens of thousands of messages, but not for ever.
const FUEL: u64 = 10_000_000;

const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Special tokens are strings, or objects that describe an added token.
fn special_tokens(fields: &Fields<'_>) -> Result<Map<String, Json>, ModelError> {
    let mut tokens = Map::new();
    for name in SPECIAL_TOKENS {
        let text = match fields.get(name) {
            None => continue,
            Some(Json::String(text)) => text,
            Some(Json::Object(token)) => match token.get("content") {
                Some(Json::String(text)) => text,
                _ => {
                    return Err(fields.wrong(name, "a string, or an object with a string `content`"));
                }
            },
            Some(_) => {
                return Err(fields.wrong(name, "a string, or an object with a string `content`"));
            }
        };
        tokens.insert(name.to_owned(), Json::String(text.clone()));
    }
    Ok(tokens)
}

fn default_template<'a>(fields: &Fields<'a>) -> Result<Option<&'a str>, ModelError> {
    let field = "chat_template";
    let expected = "a string, or a list of objects with `name` and `template`, one named `default`";
    let templates = match fields.get(field) {
        None => return Ok(None),
        Some(Json::String(text)) => return Ok(Some(text)),
        Some(Json::Array(templates)) => templates,
        Some(_) => return Err(fields.wrong(field, expected)),
    };
    let named = templates
        .iter()
        .map(|template| Some((template.get("name")?.as_str()?, template.get("template")?.as_str()?)));
    let named: Option<Vec<_>> = named.collect();
    let found = named.and_then(|named| named.into_iter().find(|(name, _)| *name == "default"));
    match found {
        Some((_, text)) => Ok(Some(text)),
        None => Err(fields.wrong(field, expected)),
    }
}

/// `{% generation %}` marks for training what the assistant said; to render, it is a block like any other.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (text, tag) = rest.split_at(at + "{%".len());
        out.push_str(text);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inside = &tag[..end];
        let word = inside.trim_matches(|char: char| char.is_whitespace() || char == '-' || char == '+');
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inside.replacen(word, replacement, 1));
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// `json.dumps` of Python, with the arguments that transformers passes through.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let refused =
        |error: serde_json::Error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}"));
    let indent: Option<usize> = kwargs.get("indent")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut out = Vec::new();
    if sort_keys == Some(true) {
        let mut sorted = serde_json::to_value(value).map_err(refused)?;
        sorted.sort_all_objects();
        write_json(&sorted, indent, &mut out).map_err(refused)?;
    } else {
        write_json(value, indent, &mut out).map_err(refused)?;
    }
    let mut text = String::from_utf8_lossy(&out).into_owned();
    if ensure_ascii == Some(true) {
        // Beyond ASCII there are only characters of strings.
        let mut units = [0; 2];
        text = text
            .chars()
            .map(|char| match char {
                char if char.is_ascii() => char.to_string(),
                char => char.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
            })
            .collect();
    }
    Ok(Value::from_safe_string(text))
}

fn write_json<T: Serialize>(value: &T, indent: Option<usize>, out: &mut Vec<u8>) -> serde_json::Result<()> {
    match indent {
        Some(spaces) => {
            let spaces = " ".repeat(spaces.min(64));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(out, Spaced)),
    }
}

/// One line with a blank after `,` and `:`, as Python writes JSON.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// C's `strftime` in the C locale at `seconds` after 1970 in UTC; the directive where one is unknown.
fn strftime(format: &str, seconds: u64) -> Result<String, String> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let days = seconds / 86_400;
    let weekday = DAYS[(days % 7) as usize];
    let (year, month, day, day_of_year) = date(days);
    let name = MONTHS[month];
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        let mut directive = chars.next().unwrap_or(' ');
        // glibc: `-` leaves out the padding.
        let bare = directive == '-';
        if bare {
            directive = chars.next().unwrap_or(' ');
        }
        let padded = |number: u64, width: usize| {
            if bare { number.to_string() } else { format!("{number:0width$}") }
        };
        out.push_str(&match directive {
            'Y' => year.to_string(),
            'y' => padded(year % 100, 2),
            'm' => padded(month as u64 + 1, 2),
            'B' => name.to_owned(),
            'b' | 'h' => name[..3].to_owned(),
            'd' => padded(day, 2),
            'e' if bare => day.to_string(),
            'e' => format!("{day:2}"),
            'j' => padded(day_of_year, 3),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'H' => padded(hour, 2),
            'I' => padded(hour12, 2),
            'M' => padded(minute, 2),
            'S' => padded(second, 2),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'F' => format!("{year}-{:02}-{day:02}", month + 1),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'Z' => "UTC".to_owned(),
            '%' => "%".to_owned(),
            other => return Err(format!("%{other}")),
        });
    }
    Ok(out)
}

/// Year, month from 0, day from 1 and day of the year from 1, of a day counted from 1970-01-01.
fn date(days: u64) -> (u64, usize, u64, u64) {
    let (mut year, mut day) = (1970, days);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = day + 1;
    let mut month = 0;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month, day + 1, day_of_year)
}

fn refused(file: &Path, error: &Error) -> ModelError {
    let mut reason = match (error.kind(), error.detail()) {
        // What a template says by raise_exception stands for itself.
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        reason.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    ModelError::ChatTemplate { file: file.to_path_buf(), line: error.line(), reason }
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn strftime_writes_dates_as_the_c_locale_does() {
        // 2024-02-29 13:05:09 UTC, a Thursday.
        let at = |format| strftime(format, 1_709_211_909);
        assert_eq!(at("%d %b %Y").as_deref(), Ok("29 Feb 2024"));
        assert_eq!(at("%A, %B %-d, %y; %j").as_deref(), Ok("Thursday, February 29, 24; 060"));
        assert_eq!(at("%H:%M:%S %I %p %F %T %e%%").as_deref(), Ok("13:05:09 01 PM 2024-02-29 13:05:09 29%"));
        assert_eq!(strftime("%F %a", 951_782_400).as_deref(), Ok("2000-02-29 Tue"));
        assert_eq!(strftime("%F %j", 4_102_444_799).as_deref(), Ok("2099-12-31 365"));
        assert_eq!(at("%Q"), Err("%Q".to_owned()));
        assert_eq!(at("%"), Err("% ".to_owned()));
    }
}
