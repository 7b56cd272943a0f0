//! What an API server makes of an object: a small reading of structural schemas, and CEL rules.

use kube::core::cel::Validator;
use regex::Regex;
use serde_json::Value;

/// What an API server refuses, as text; empty when it takes the object.
pub fn refused_by_api_server(schema: &Value, object: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    walk("", schema, object, &mut faults);
    if let Err(errors) = Validator::new().validate(schema, object, None) {
        faults.extend(errors.as_slice().iter().map(|error| format!("CEL {error}")));
    }
    faults
}

/// The parts of a structural schema that our types use.
fn walk(path: &str, schema: &Value, value: &Value, faults: &mut Vec<String>) {
    let mut fault = |what: &str| faults.push(format!("{path}: {what}"));
    let is_quantity = schema["x-kubernetes-int-or-string"] == true;
    let fits = match schema["type"].as_str() {
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        _ => !is_quantity || value.is_string() || value.is_i64(),
    };
    if !fits {
        return fault("type");
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        fault("enum");
    }
    if let Some(number) = value.as_f64() {
        let below = schema["minimum"]
            .as_f64()
            .is_some_and(|least| number < least);
        let above = schema["maximum"].as_f64().is_some_and(|most| number > most);
        if below || above {
            fault("range");
        }
    }
    if let Some(text) = value.as_str() {
        let length = text.chars().count() as u64;
        let short = schema["minLength"]
            .as_u64()
            .is_some_and(|least| length < least);
        let long = schema["maxLength"]
            .as_u64()
            .is_some_and(|most| length > most);
        let odd = schema["pattern"]
            .as_str()
            .is_some_and(|pattern| !Regex::new(pattern).unwrap().is_match(text));
        if short || long || odd {
            fault("text");
        }
    }
    if let Some(items) = value.as_array() {
        if schema["maxItems"]
            .as_u64()
            .is_some_and(|most| items.len() as u64 > most)
        {
            fault("items");
        }
        for (index, item) in items.iter().enumerate() {
            walk(&format!("{path}[{index}]"), &schema["items"], item, faults);
        }
    } else if let Some(fields) = value.as_object() {
        for required in schema["required"].as_array().into_iter().flatten() {
            if !fields.contains_key(required.as_str().unwrap_or_default()) {
                faults.push(format!("{path}: required {required}"));
            }
        }
        for (key, field) in fields {
            let below = match &schema["properties"][key] {
                Value::Null => &schema["additionalProperties"],
                known => known,
            };
            if !below.is_null() {
                walk(&format!("{path}.{key}"), below, field, faults);
            }
        }
    }
}
