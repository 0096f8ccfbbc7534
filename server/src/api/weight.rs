//! The memory that a request will take once it is decoded, estimated from its bytes. 4 MiB of empty messages decode to 1 GiB.
//!
//! prost allocates a value for each message in a repeated field, even an empty one. So the fields are counted on the wire
//! first, each with the size that the contract's descriptors give it in memory.

use std::{collections::HashMap, sync::LazyLock};

use jobledger_proto::FILE_DESCRIPTOR_SET;
use prost::Message as _;
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

/// Approximate bytes that a decoded request may take: twice what the values of the largest payload take.
pub(super) const MOST: usize = 40 << 20;
/// JSON values that one request may have. A payload at its limit of 1 MiB has no more: a value and its separator take
/// two bytes.
pub(crate) const MOST_VALUES: usize = 1 << 19;

/// Bytes of a `String`, a `Vec` or a box, without what it points to. A map takes more.
const INLINE: usize = 24;
const MAP: usize = 48;
/// Bytes of the smallest allocation.
const ALLOCATED: usize = 16;
/// A growing vector may have twice the capacity that it needs. Entries of a map take part of a node.
const GROWN: usize = 2;
/// prost refuses deeper nesting.
const DEEPEST: usize = 100;

struct Shape {
    /// Bytes of one value, without what its fields have allocated.
    inline: usize,
    /// By field number. The numbers are small.
    fields: Vec<Option<Field>>,
}

#[derive(Clone, Copy)]
struct Field {
    is_repeated: bool,
    kind: FieldKind,
}

#[derive(Clone, Copy)]
enum FieldKind {
    /// A number, a bool or an enum.
    Scalar,
    /// A string or bytes.
    Text,
    Message(usize),
}

/// The shapes of all messages, and for each call's path the index of its request's shape.
struct Shapes {
    shapes: Vec<Shape>,
    requests: HashMap<String, usize>,
}

static SHAPES: LazyLock<Shapes> = LazyLock::new(|| {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap_or_default();
    Shapes::of(&set)
});

impl Shapes {
    fn of(set: &FileDescriptorSet) -> Self {
        let mut messages = Vec::new();
        for file in &set.file {
            for message in &file.message_type {
                collect(&format!(".{}", file.package()), message, &mut messages);
            }
        }
        let places: HashMap<_, _> = messages.iter().enumerate().map(|(n, (name, _))| (name.as_str(), n)).collect();
        let kind = |field: &FieldDescriptorProto| match field.r#type() {
            Type::String | Type::Bytes => FieldKind::Text,
            Type::Message => places.get(field.type_name()).map_or(FieldKind::Text, |n| FieldKind::Message(*n)),
            _ => FieldKind::Scalar,
        };
        let shape = |(_, message): &(String, &DescriptorProto)| {
            let numbers = message.field.iter().map(|field| field.number() as usize + 1);
            let mut fields = vec![None; numbers.max().unwrap_or_default()];
            for field in &message.field {
                let is_repeated = field.label() == Label::Repeated;
                fields[field.number() as usize] = Some(Field { is_repeated, kind: kind(field) });
            }
            Shape { inline: inline_of(message), fields }
        };
        let shapes = messages.iter().map(shape).collect();
        let mut requests = HashMap::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    requests.extend(places.get(method.input_type()).map(|n| (path, *n)));
                }
            }
        }
        Self { shapes, requests }
    }

    /// Estimates the bytes of a message of this shape. Stops counting once they exceed `most`.
    fn weigh(&self, shape: usize, bytes: &[u8], most: usize) -> usize {
        let mut weight = bytes.len();
        self.add(shape, bytes, DEEPEST, most, &mut weight);
        weight
    }

    fn add(&self, shape: usize, mut rest: &[u8], levels: usize, most: usize, weight: &mut usize) {
        let Some(shape) = self.shapes.get(shape).filter(|_| levels > 0) else { return };
        while *weight <= most
            && let Some(found) = next_field(&mut rest)
        {
            let Some(Some(field)) = shape.fields.get(found.number as usize) else { continue };
            *weight += match (field.kind, found.text) {
                (FieldKind::Scalar, None) if field.is_repeated => GROWN * size_of::<u64>(),
                (FieldKind::Scalar, None) => 0,
                // Packed: each number takes at least one byte.
                (FieldKind::Scalar, Some(packed)) => GROWN * size_of::<u64>() * packed.len(),
                (FieldKind::Text, _) if field.is_repeated => GROWN * INLINE + ALLOCATED,
                (FieldKind::Text, _) => ALLOCATED,
                (FieldKind::Message(of), text) => {
                    self.add(of, text.unwrap_or_default(), levels - 1, most, weight);
                    let inline = self.shapes.get(of).map_or(0, |shape| shape.inline);
                    if field.is_repeated { GROWN * inline + ALLOCATED } else { inline }
                }
            };
        }
    }
}

/// Collects a message and all messages nested in it, by their full names.
fn collect<'a>(within: &str, message: &'a DescriptorProto, all: &mut Vec<(String, &'a DescriptorProto)>) {
    let name = format!("{within}.{}", message.name());
    for nested in &message.nested_type {
        collect(&name, nested, all);
    }
    all.push((name, message));
}

/// Bytes that a field takes inside its struct.
fn inline(field: &FieldDescriptorProto) -> usize {
    match (field.label(), field.r#type()) {
        (Label::Repeated, Type::Message) => MAP,
        (Label::Repeated, _) | (_, Type::String | Type::Bytes | Type::Message) => INLINE,
        _ => size_of::<u64>(),
    }
}

/// Bytes that a struct takes. A `oneof` counts as its largest field.
fn inline_of(message: &DescriptorProto) -> usize {
    let of_one = |field: &&FieldDescriptorProto| field.oneof_index.is_some() && !field.proto3_optional();
    let mut unions: HashMap<i32, usize> = HashMap::new();
    for field in message.field.iter().filter(of_one) {
        let largest = unions.entry(field.oneof_index()).or_default();
        *largest = inline(field).max(*largest);
    }
    let fields: usize = message.field.iter().filter(|field| !of_one(field)).map(inline).sum();
    fields + unions.values().map(|largest| largest + size_of::<u64>()).sum::<usize>()
}

struct WireField<'a> {
    number: u32,
    /// The content of a length-delimited field.
    text: Option<&'a [u8]>,
}

/// The next field; `None` at the end, or where the bytes are malformed, which prost will report.
fn next_field<'a>(rest: &mut &'a [u8]) -> Option<WireField<'a>> {
    let key = varint(rest)?;
    let number = u32::try_from(key >> 3).ok()?;
    let skip = |rest: &mut &'a [u8], n: usize| rest.split_off(..n).map(|_| ());
    let text = match key & 7 {
        0 => varint(rest).map(|_| None)?,
        1 => skip(rest, 8).map(|()| None)?,
        2 => {
            let length = usize::try_from(varint(rest)?).ok()?;
            Some(rest.split_off(..length)?)
        }
        5 => skip(rest, 4).map(|()| None)?,
        _ => return None,
    };
    Some(WireField { number, text })
}

/// A varint of the Protocol Buffers encoding.
fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for n in 0..10 {
        let byte = *rest.split_off_first()?;
        value |= u64::from(byte & 0x7f) << (7 * n);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// The shape of the requests of one call.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestShape(usize);

impl RequestShape {
    /// The shape for the path of a call; `None` if the contract has no such call.
    pub(super) fn of(path: &str) -> Option<Self> {
        SHAPES.requests.get(path).copied().map(Self)
    }

    /// True if the request takes at most [`MOST`] bytes once it is decoded.
    pub(super) fn may_be_decoded(self, message: &[u8]) -> bool {
        SHAPES.weigh(self.0, message, MOST) <= MOST
    }
}

/// True if the JSON has at most [`MOST_VALUES`] values. Its parser has to check that it is JSON.
pub(crate) fn may_be_parsed(json: &[u8]) -> bool {
    let (mut values, mut is_text, mut is_escaped) = (0, false, false);
    for byte in json {
        match (is_text, byte) {
            (true, _) if is_escaped => is_escaped = false,
            (true, b'\\') => is_escaped = true,
            (_, b'"') => is_text = !is_text,
            (false, b',' | b'[' | b'{') => values += 1,
            _ => {}
        }
    }
    values <= MOST_VALUES
}

#[cfg(test)]
mod tests {
    use jobledger_proto::v1 as pb;
    use prost_types::{ListValue, Value, value::Kind as Json};

    use super::*;

    const BATCH: &str = "/jobledger.v1.JobService/BatchCreateJobs";
    const CREATE: &str = "/jobledger.v1.JobService/CreateJob";

    fn may_be_decoded(path: &str, message: &[u8]) -> bool {
        RequestShape::of(path).unwrap().may_be_decoded(message)
    }

    fn list(n: usize, value: &Value) -> Value {
        Value { kind: Some(Json::ListValue(ListValue { values: vec![value.clone(); n] })) }
    }

    #[test]
    fn empty_messages_are_counted_before_they_are_made() {
        assert!(!may_be_decoded(BATCH, &[0x0a, 0].repeat(2 << 20)));
        let create = pb::CreateJobRequest { r#type: "t".to_owned(), ..Default::default() };
        let most = pb::BatchCreateJobsRequest { requests: vec![create; 1_000] };
        assert!(may_be_decoded(BATCH, &most.encode_to_vec()));
    }

    #[test]
    fn values_labels_and_what_nests_weigh_what_they_take() {
        let of = |payload| pb::CreateJobRequest { payload: Some(payload), ..Default::default() }.encode_to_vec();
        let null = Value { kind: Some(Json::NullValue(0)) };
        let zero = Value { kind: Some(Json::NumberValue(0.0)) };
        // As many as fit into a payload of 1 MiB.
        assert!(may_be_decoded(CREATE, &of(list(200_000, &null))));
        assert!(may_be_decoded(CREATE, &of(list(300_000, &zero))));
        assert!(!may_be_decoded(CREATE, &of(list(900_000, &null))));
        assert!(!may_be_decoded(CREATE, &of(list(300_000, &list(1, &null)))));
        let labels = (0..400_000).map(|n| (format!("{n:x}"), String::new())).collect();
        assert!(!may_be_decoded(CREATE, &pb::CreateJobRequest { labels, ..Default::default() }.encode_to_vec()));
    }

    #[test]
    fn what_can_not_be_read_is_for_others_to_say() {
        for bytes in [&[0xff; 20][..], &[0x0a, 0x7f], &[0x0b], &[]] {
            assert!(may_be_decoded(BATCH, bytes), "{bytes:?}");
        }
        assert!(RequestShape::of("/x.Y/Z").is_none());
    }

    #[test]
    fn json_is_counted_by_what_separates_values() {
        assert!(may_be_parsed(format!("[{}0]", "0,".repeat(MOST_VALUES - 1)).as_bytes()));
        assert!(!may_be_parsed(format!("[{}0]", "0,".repeat(MOST_VALUES)).as_bytes()));
        assert!(may_be_parsed(format!(r#"["\"{}"]"#, ",[{".repeat(MOST_VALUES)).as_bytes()));
        assert!(!may_be_parsed("[".repeat(MOST_VALUES + 1).as_bytes()));
    }
}
