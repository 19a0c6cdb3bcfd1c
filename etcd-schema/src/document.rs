//! Parses the bytes of a value, however malformed, into one bounded JSON tree.
//!
//! JSON and YAML use the same visitor. It keeps a path for messages, refuses duplicate keys, and stops at the first
//! list, object or tree beyond its limit. A hostile value costs no more memory than the largest valid one: input beyond
//! a limit is neither read nor kept.

use std::{cell::RefCell, fmt};

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::violation::{Report, Violations, join, quoted};

/// Largest value in bytes: etcd's default limit of a request.
pub const MAX_VALUE_BYTES: usize = 3 * 512 * 1024;

/// How large one tree may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DocumentLimits {
    /// Entries of one list, fields of one object.
    pub(crate) entries: usize,
    /// Values in the whole tree.
    pub(crate) nodes: usize,
}

impl DocumentLimits {
    /// For records of the mesh itself.
    pub(crate) const RECORD: Self = Self { entries: 4096, nodes: 16_384 };
    /// For Kubernetes objects, which may carry long lists of addresses.
    pub(crate) const KUBERNETES: Self = Self { entries: 16_384, nodes: 131_072 };
}

/// Lists and objects inside each other.
const MAX_DEPTH: usize = 64;

/// The object that `value` holds, as JSON when its first character is `{` or `[`, else as YAML.
pub(crate) fn read(value: &[u8], limits: DocumentLimits) -> Result<Map<String, Value>, Violations> {
    let text = text(value)?;
    let context = ReadContext { limits, state: RefCell::default() };
    let root = match text.trim_start().as_bytes().first() {
        None => {
            return Err(Violations::one("", "the value is empty", "write one JSON or YAML object"));
        }
        Some(b'{' | b'[') => read_json(text, &context)?,
        Some(_) => read_yaml(text, &context)?,
    };
    match root {
        Value::Object(map) => Ok(map),
        other => {
            Err(Violations::one("", format!("the value is {}", describe(&other)), "write one JSON or YAML object"))
        }
    }
}

/// A value in a message: its text if short and plain, else its kind.
pub fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => quoted(s),
        Value::Array(a) if a.is_empty() => "an empty list".into(),
        Value::Array(a) => format!("a list of {}", a.len()),
        Value::Object(_) => "an object".into(),
    }
}

fn text(value: &[u8]) -> Result<&str, Violations> {
    if value.len() > MAX_VALUE_BYTES {
        return Err(Violations::one(
            "",
            format!("the value has {} bytes", value.len()),
            format!("at most {MAX_VALUE_BYTES} are read"),
        ));
    }
    let text = std::str::from_utf8(value).map_err(|e| {
        Violations::one("", format!("byte {} is not UTF-8", e.valid_up_to()), "write JSON or YAML in UTF-8")
    })?;
    if let Some(at) = text.find('\0') {
        return Err(Violations::one("", format!("byte {at} is NUL"), "write JSON or YAML text without NUL bytes"));
    }
    Ok(text)
}

fn read_json(text: &str, context: &ReadContext) -> Result<Value, Violations> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let root = ValueNode { context }.deserialize(&mut reader).map_err(|e| {
        context.violation().unwrap_or_else(|| {
            Violations::one(
                "",
                format!("not JSON ({e})"),
                "text that begins with \"{\" or \"[\" is read as JSON: fix it there",
            )
        })
    })?;
    reader.end().map_err(|e| {
        Violations::one(
            "",
            format!("more text follows the first object (line {})", e.line()),
            "one key takes one object: put each under its own key",
        )
    })?;
    Ok(root)
}

fn read_yaml(text: &str, context: &ReadContext) -> Result<Value, Violations> {
    serde_saphyr::with_deserializer_from_str_with_options(text, yaml_options(context.limits), |d| {
        ValueNode { context }.deserialize(d)
    })
    .map_err(|e| context.violation().unwrap_or_else(|| yaml_violation(&e)))
}

fn yaml_options(limits: DocumentLimits) -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_events: limits.nodes.saturating_mul(4),
            max_nodes: limits.nodes.saturating_mul(2),
            max_documents: 2,
            max_anchors: 0,
            max_aliases: 0,
        },
        // Our own visitor sees repeated keys and can name their path.
        duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::PassThrough,
        merge_keys: serde_saphyr::options::MergeKeyPolicy::Error,
        // Our own visitor refuses them, with their path.
        non_finite_float_policy: serde_saphyr::options::NonFiniteFloatPolicy::PassThrough,
        strict_booleans: true,
        emit_comments: false,
        // A snippet of the input may show a pre-shared key.
        with_snippet: false,
    }
}

/// In words of our own: the library's may repeat parts of the value, and those may be secret.
fn yaml_violation(error: &serde_saphyr::Error) -> Violations {
    use serde_saphyr::{Error, budget::BudgetBreach};
    let at = error.location().map_or_else(String::new, |l| format!(" (line {}, column {})", l.line(), l.column()));
    match error {
        Error::MultipleDocuments { .. } => Violations::one(
            "",
            format!("several YAML documents{at}"),
            "one key takes one object: put each under its own key",
        ),
        Error::Budget { breach: BudgetBreach::Anchors { .. } | BudgetBreach::Aliases { .. }, .. } => {
            Violations::one("", format!("a YAML anchor or alias{at}"), "write the value out where it is used")
        }
        Error::Budget { .. } => Violations::one(
            "",
            format!("too large or too deeply nested YAML{at}"),
            format!("at most {MAX_DEPTH} levels are read: simplify or split the value"),
        ),
        _ => Violations::one("", format!("neither JSON nor YAML{at}"), "write one JSON or YAML object"),
    }
}

/// State of reading one value.
struct ReadContext {
    limits: DocumentLimits,
    state: RefCell<ReadState>,
}

#[derive(Default)]
struct ReadState {
    path: String,
    depth: usize,
    nodes: usize,
    /// Why reading stopped, when it was one of our own limits.
    violation: Option<Violations>,
}

impl ReadContext {
    fn violation(&self) -> Option<Violations> {
        self.state.borrow_mut().violation.take()
    }

    fn refuse<E: serde::de::Error>(&self, found: impl Into<String>, expected: impl Into<String>) -> E {
        let mut state = self.state.borrow_mut();
        let mut report = Report::default();
        report.add(&state.path, found, expected);
        if let Err(violations) = report.finish::<()>(None) {
            state.violation.get_or_insert(violations);
        }
        E::custom("refused")
    }

    fn enter<E: serde::de::Error>(&self) -> Result<(), E> {
        let depth = {
            let mut state = self.state.borrow_mut();
            state.depth += 1;
            state.depth
        };
        if depth > MAX_DEPTH {
            return Err(self.refuse("nested too deeply", format!("at most {MAX_DEPTH} levels are read")));
        }
        Ok(())
    }

    fn leave(&self) {
        self.state.borrow_mut().depth -= 1;
    }

    /// Counts one more value of the tree.
    fn count<E: serde::de::Error>(&self) -> Result<(), E> {
        let nodes = {
            let mut state = self.state.borrow_mut();
            state.nodes += 1;
            state.nodes
        };
        if nodes > self.limits.nodes {
            return Err(self.refuse(
                format!("past the value's first {} fields and entries", self.limits.nodes),
                "no more are read: simplify or split the value",
            ));
        }
        Ok(())
    }

    fn full<E: serde::de::Error>(&self, what: &str) -> E {
        self.refuse(format!("longer than {} {what}", self.limits.entries), "no more are read: split the value")
    }

    /// Goes down to `name`; the answer goes to [`Self::up`].
    fn down(&self, name: &str) -> usize {
        let mut state = self.state.borrow_mut();
        let before = state.path.len();
        state.path = if name.starts_with('[') {
            let mut path = std::mem::take(&mut state.path);
            path.push_str(name);
            path
        } else {
            join(&state.path, name)
        };
        before
    }

    fn up(&self, before: usize) {
        self.state.borrow_mut().path.truncate(before);
    }
}

/// Seed for one value of the tree.
#[derive(Clone, Copy)]
struct ValueNode<'c> {
    context: &'c ReadContext,
}

impl<'de> DeserializeSeed<'de> for ValueNode<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.context.count()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueNode<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: serde::de::Error>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E: serde::de::Error>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_u64<E: serde::de::Error>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_i128<E: serde::de::Error>(self, v: i128) -> Result<Value, E> {
        i64::try_from(v).map_or_else(|_| Err(self.huge_number()), |v| self.visit_i64(v))
    }

    fn visit_u128<E: serde::de::Error>(self, v: u128) -> Result<Value, E> {
        u64::try_from(v).map_or_else(|_| Err(self.huge_number()), |v| self.visit_u64(v))
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Value, E> {
        // Integers past 64 bits arrive here rounded; they would not survive a rewrite.
        const TWO_POW_63: f64 = 9_223_372_036_854_775_808.0;
        if v.abs() >= TWO_POW_63 {
            return Err(self.huge_number());
        }
        Number::from_f64(v).map_or_else(|| Err(self.huge_number()), |n| Ok(Value::Number(n)))
    }

    fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<Value, E> {
        self.visit_string(v.to_owned())
    }

    fn visit_string<E: serde::de::Error>(self, v: String) -> Result<Value, E> {
        if v.contains('\0') {
            return Err(self.context.refuse("text with a NUL character", "leave it out"));
        }
        Ok(Value::String(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        self.context.enter()?;
        let mut list = Vec::new();
        loop {
            let before = self.context.down(&format!("[{}]", list.len()));
            let entry = entries.next_element_seed(self)?;
            self.context.up(before);
            let Some(entry) = entry else { break };
            if list.len() == self.context.limits.entries {
                return Err(self.context.full("entries"));
            }
            list.push(entry);
        }
        self.context.leave();
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        self.context.enter()?;
        let mut map = Map::new();
        while let Some(name) = fields.next_key_seed(FieldName)? {
            let before = self.context.down(&name);
            if map.contains_key(&name) {
                return Err(self.context.refuse("a duplicate", "write it once"));
            }
            if name.contains('\0') {
                return Err(self.context.refuse("a name with a NUL character", "leave it out"));
            }
            if map.len() == self.context.limits.entries {
                self.context.up(before);
                return Err(self.context.full("fields"));
            }
            let value = fields.next_value_seed(self)?;
            self.context.up(before);
            map.insert(name, value);
        }
        self.context.leave();
        Ok(Value::Object(map))
    }
}

impl ValueNode<'_> {
    fn huge_number<E: serde::de::Error>(self) -> E {
        self.context
            .refuse("a number out of range", "numbers must be finite, between -2^63 and 2^64; write others as text")
    }
}

/// The name of one field; YAML's numbers and booleans count as the text they are written as.
struct FieldName;

impl<'de> DeserializeSeed<'de> for FieldName {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_string(self)
    }
}

impl Visitor<'_> for FieldName {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<String, E> {
        Ok(v.to_owned())
    }

    fn visit_string<E: serde::de::Error>(self, v: String) -> Result<String, E> {
        Ok(v)
    }
}
