//! The committed files are what the types say, and the definition is one an API server takes.

use std::path::Path;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSONSchemaProps, JSONSchemaPropsOrArray,
};

#[test]
fn committed_files_are_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the repository");
    for file in crds::files().expect("files generate") {
        let committed = std::fs::read_to_string(root.join(file.path))
            .unwrap_or_else(|error| panic!("{}: {error}; run `cargo run -p crds`", file.path));
        assert!(
            committed == file.text,
            "{} is stale; run `cargo run -p crds`",
            file.path
        );
    }
}

#[test]
fn the_definition_stays_under_100_kb() {
    for file in crds::files().expect("files generate") {
        assert!(
            file.text.len() < 100_000,
            "{} has {} bytes",
            file.path,
            file.text.len()
        );
    }
}

#[test]
fn helm_sees_no_template_in_the_definition() {
    let files = crds::files().expect("files generate");
    assert!(files.iter().all(|file| !file.text.contains("{{")));
}

/// Every field is documented, because the text is what `kubectl explain` shows.
#[test]
fn every_field_is_explained() {
    fn walk(path: &str, schema: &JSONSchemaProps, silent: &mut Vec<String>) {
        for (name, property) in schema.properties.iter().flatten() {
            let path = format!("{path}.{name}");
            if property.description.is_none() {
                silent.push(path.clone());
            }
            walk(&path, property, silent);
            if let Some(JSONSchemaPropsOrArray::Schema(items)) = &property.items {
                walk(&format!("{path}[]"), items, silent);
            }
        }
    }
    let crd = operator_api::crd();
    let schema = crd.spec.versions[0].schema.as_ref().expect("a schema");
    let root = schema
        .open_api_v3_schema
        .as_ref()
        .expect("an OpenAPI schema");
    let mut silent = Vec::new();
    for part in ["spec", "status"] {
        let part_schema = &root.properties.as_ref().expect("properties")[part];
        walk(part, part_schema, &mut silent);
    }
    assert!(silent.is_empty(), "without description: {silent:?}");
}
