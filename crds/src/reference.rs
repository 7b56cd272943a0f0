//! The reference page: every field with its type, default, limits and rules, from the schema alone.

use std::fmt::Write;

use anyhow::Context;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};

/// The page as Markdown.
pub fn page(crd: &CustomResourceDefinition) -> anyhow::Result<String> {
    let version = crd.spec.versions.first().context("a served version")?;
    let schema = version
        .schema
        .as_ref()
        .and_then(|schema| schema.open_api_v3_schema.as_ref())
        .context("a schema")?;
    let names = &crd.spec.names;
    let mut page = String::new();
    writeln!(
        page,
        "<!-- Generated from operator/api by `cargo run -p crds`; do not edit. -->\n"
    )?;
    writeln!(page, "# {}\n", names.kind)?;
    writeln!(
        page,
        "{}\n",
        schema.description.as_deref().unwrap_or_default()
    )?;
    writeln!(
        page,
        "`apiVersion: {}/{}`, `kind: {}`; kubectl also knows it as `{}`. Subresources: `status` and `scale`.\n",
        crd.spec.group,
        version.name,
        names.kind,
        names
            .short_names
            .iter()
            .flatten()
            .cloned()
            .collect::<Vec<_>>()
            .join("`, `"),
    )?;
    columns(&mut page, crd)?;
    rules(&mut page, schema)?;
    for section in ["spec", "status"] {
        let part = schema
            .properties
            .as_ref()
            .and_then(|properties| properties.get(section))
            .with_context(|| format!("{section} in the schema"))?;
        writeln!(page, "## {section}\n")?;
        fields(&mut page, section, part)?;
    }
    Ok(page.trim_end().to_owned() + "\n")
}

fn columns(page: &mut String, crd: &CustomResourceDefinition) -> anyhow::Result<()> {
    writeln!(page, "## Columns of `kubectl get`\n")?;
    writeln!(
        page,
        "| Column | From | With `-o wide` only |\n|---|---|---|"
    )?;
    for column in crd
        .spec
        .versions
        .iter()
        .flat_map(|v| v.additional_printer_columns.iter().flatten())
    {
        let wide = if column.priority.unwrap_or(0) > 0 {
            "yes"
        } else {
            ""
        };
        writeln!(
            page,
            "| {} | `{}` | {wide} |",
            column.name.to_uppercase(),
            column.json_path
        )?;
    }
    writeln!(page)?;
    Ok(())
}

/// One table for the fields of an object, then one for each object below it.
fn fields(page: &mut String, path: &str, schema: &JSONSchemaProps) -> anyhow::Result<()> {
    let Some(properties) = &schema.properties else {
        return Ok(());
    };
    rules(page, schema)?;
    writeln!(page, "| Field | Type | Meaning |\n|---|---|---|")?;
    for (name, property) in properties {
        let required = schema.required.iter().flatten().any(|r| r == name);
        let mark = if required { " (required)" } else { "" };
        writeln!(
            page,
            "| `{name}`{mark} | {} | {}{} |",
            type_of(property),
            one_line(property.description.as_deref().unwrap_or_default()),
            limits(property)?,
        )?;
    }
    writeln!(page)?;
    for (name, property) in properties {
        let (below, suffix) = match &property.items {
            Some(JSONSchemaPropsOrArray::Schema(items)) => (items.as_ref(), "[]"),
            _ => (property, ""),
        };
        let path = format!("{path}.{name}{suffix}");
        if below.properties.is_some() {
            writeln!(page, "### {path}\n")?;
            fields(page, &path, below)?;
        } else if property
            .x_kubernetes_validations
            .iter()
            .flatten()
            .next()
            .is_some()
        {
            writeln!(page, "### {path}\n")?;
            rules(page, property)?;
        }
    }
    Ok(())
}

fn rules(page: &mut String, schema: &JSONSchemaProps) -> anyhow::Result<()> {
    let rules = schema
        .x_kubernetes_validations
        .as_deref()
        .unwrap_or_default();
    for rule in rules {
        let message = rule.message.as_deref().unwrap_or(&rule.rule);
        writeln!(page, "- Rule: {}", one_line(message))?;
    }
    if !rules.is_empty() {
        writeln!(page)?;
    }
    Ok(())
}

fn type_of(schema: &JSONSchemaProps) -> String {
    if schema.x_kubernetes_int_or_string == Some(true) {
        return "quantity".into();
    }
    match (
        schema.type_.as_deref(),
        &schema.items,
        &schema.additional_properties,
    ) {
        (Some("array"), Some(JSONSchemaPropsOrArray::Schema(items)), _) => {
            format!("list of {}", type_of(items))
        }
        (Some("object"), _, Some(JSONSchemaPropsOrBool::Schema(values))) => {
            format!("map to {}", type_of(values))
        }
        (Some(name), ..) => name.to_owned(),
        (None, ..) => "any".into(),
    }
}

fn limits(schema: &JSONSchemaProps) -> anyhow::Result<String> {
    let mut parts = Vec::new();
    if let Some(values) = &schema.enum_ {
        let words: Vec<String> = values
            .iter()
            .filter_map(|value| value.0.as_str().map(|word| format!("`{word}`")))
            .collect();
        parts.push(format!("One of {}.", words.join(", ")));
    }
    match (schema.minimum, schema.maximum) {
        (Some(low), Some(high)) => parts.push(format!("From {low} to {high}.")),
        (Some(low), None) => parts.push(format!("At least {low}.")),
        (None, Some(high)) => parts.push(format!("At most {high}.")),
        (None, None) => {}
    }
    if let Some(most) = schema.max_length {
        parts.push(format!("At most {most} characters."));
    }
    if let Some(most) = schema.max_items {
        parts.push(format!("At most {most} entries."));
    }
    if let Some(pattern) = &schema.pattern {
        parts.push(format!("Pattern `{}`.", pattern.replace('|', "\\|")));
    }
    if let Some(default) = schema.default.as_ref().filter(|value| !value.0.is_object()) {
        parts.push(format!("Default `{}`.", serde_json::to_string(&default.0)?));
    }
    Ok(parts.iter().map(|part| format!(" {part}")).collect())
}

fn one_line(text: &str) -> String {
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .replace('|', "\\|")
}
