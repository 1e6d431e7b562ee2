//! Values, records and layouts of every shape, for property tests.
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use crate::canonical::Canonical;
use crate::layout::{Column, Layout};

/// A value as it is before it is sent.
#[derive(Debug, Clone)]
pub enum Value {
    Bytes(Vec<u8>),
    Array(Vec<Option<Value>>),
    Composite(Vec<Option<Value>>),
    Range(Option<Box<Value>>, Option<Box<Value>>),
    Multirange(Vec<Value>),
}

impl Value {
    /// What a server sends for it where every type has OID `oid` and, if `stale`, null flags stay set.
    /// With 0 and `false` that is the canonical form.
    pub fn send(&self, oid: u32, stale: bool) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Value::Bytes(bytes) => out.extend(bytes),
            Value::Array(elements) => {
                let has_null = elements.iter().any(Option::is_none);
                out.extend(u32::from(!elements.is_empty()).to_be_bytes());
                out.extend(u32::from(has_null || stale).to_be_bytes());
                out.extend(oid.to_be_bytes());
                if !elements.is_empty() {
                    out.extend((elements.len() as u32).to_be_bytes());
                    out.extend((-3i32).to_be_bytes());
                }
                elements.iter().for_each(|element| field(element.as_ref(), oid, stale, &mut out));
            }
            Value::Composite(attributes) => {
                out.extend((attributes.len() as u32).to_be_bytes());
                for attribute in attributes {
                    out.extend(oid.to_be_bytes());
                    field(attribute.as_ref(), oid, stale, &mut out);
                }
            }
            Value::Range(lower, upper) => {
                out.push(if lower.is_some() { 0x02 } else { 0x08 } | if upper.is_some() { 0 } else { 0x10 });
                for bound in [lower, upper].into_iter().flatten() {
                    field(Some(bound), oid, stale, &mut out);
                }
            }
            Value::Multirange(ranges) => {
                out.extend((ranges.len() as u32).to_be_bytes());
                ranges.iter().for_each(|range| field(Some(range), oid, stale, &mut out));
            }
        }
        out
    }
}

fn field(value: Option<&Value>, oid: u32, stale: bool, out: &mut Vec<u8>) {
    match value {
        None => out.extend((-1i32).to_be_bytes()),
        Some(value) => {
            let bytes = value.send(oid, stale);
            out.extend((bytes.len() as i32).to_be_bytes());
            out.extend(bytes);
        }
    }
}

/// How some type becomes canonical.
pub fn canonical() -> impl Strategy<Value = Canonical> {
    Just(Canonical::Verbatim).prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            inner.clone().prop_map(Canonical::array),
            vec(inner.clone(), 0..4).prop_map(Canonical::composite),
            inner.clone().prop_map(|subtype| Canonical::Range(Box::new(subtype))),
            inner.prop_map(|subtype| Canonical::Multirange(Box::new(subtype))),
        ]
    })
}

/// Some value of such a type.
pub fn value(canonical: &Canonical) -> BoxedStrategy<Value> {
    match canonical {
        Canonical::Verbatim => vec(any::<u8>(), 0..12).prop_map(Value::Bytes).boxed(),
        Canonical::Array(element) => vec(option::of(value(element)), 0..4).prop_map(Value::Array).boxed(),
        Canonical::Composite(attributes) => {
            let attributes: Vec<_> = attributes.iter().map(|inner| option::of(value(inner))).collect();
            attributes.prop_map(Value::Composite).boxed()
        }
        Canonical::Range(subtype) => {
            let bound = || option::of(value(subtype).prop_map(Box::new));
            (bound(), bound()).prop_map(|(lower, upper)| Value::Range(lower, upper)).boxed()
        }
        Canonical::Multirange(subtype) => {
            vec(value(&Canonical::Range(subtype.clone())), 0..3).prop_map(Value::Multirange).boxed()
        }
    }
}

/// Some valid layout, mostly with a key.
pub fn layout() -> impl Strategy<Value = Layout> {
    // What a column is for: 0 and 1 content, 2 content and key, 3 key, 4 rest.
    let columns = vec((canonical(), 0..5u8), 1..6);
    let shuffled = columns.prop_flat_map(|columns| {
        let order: Vec<usize> = (0..columns.len()).collect();
        (Just(columns), Just(order).prop_shuffle())
    });
    shuffled.prop_map(|(columns, order)| {
        let role = |wanted: &[u8]| -> Vec<usize> {
            order.iter().copied().filter(|index| wanted.contains(&columns[*index].1)).collect()
        };
        let (mut content, key, mut rest) = (role(&[0, 1, 2]), role(&[2, 3]), role(&[4]));
        if content.is_empty() {
            content = order.clone();
            rest.clear();
        }
        let column = |(index, (canonical, _))| Column {
            name: format!("column {index}"),
            type_name: String::from("some type"),
            canonical,
        };
        let columns = columns.into_iter().enumerate().map(column).collect();
        Layout { encoding_version: crate::ENCODING_VERSION, columns, content, key, rest }
    })
}

/// Some record of `layout`.
pub fn record(layout: &Layout) -> impl Strategy<Value = Vec<Option<Value>>> + use<> {
    layout.columns.iter().map(|column| option::of(value(&column.canonical))).collect::<Vec<_>>()
}
