//! The alerts and the configuration for Prometheus, judged by its own tool.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/prometheus")
}

fn promtool(args: &[&str]) {
    let output = Command::new("promtool").args(args).current_dir(folder()).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "promtool {args:?}: {said}");
}

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    promtool(&["test", "rules", "alerts.test.yaml"]);
    let read = |name: &str| -> Value {
        let text = fs::read_to_string(folder().join(name)).unwrap();
        serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let (alerts, tests) = (read("alerts.yaml"), read("alerts.test.yaml"));
    let tried = |alert: &str, fires: bool| {
        let tests =
            tests["tests"].as_array().unwrap().iter().flat_map(|test| test["promql_expr_test"].as_array().unwrap());
        tests
            .filter(|test| {
                test["expr"].as_str().unwrap().contains(&format!(r#"alertname="{alert}", alertstate="firing""#))
            })
            .any(|test| test["exp_samples"].is_array() == fires)
    };
    for rule in alerts["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap()) {
        let alert = rule["alert"].as_str().unwrap();
        assert!(tried(alert, true) && tried(alert, false), "{alert} is not tried in alerts.test.yaml");
    }
}

#[test]
fn the_configuration_is_one() {
    promtool(&["check", "config", "--syntax-only", "prometheus.yaml"]);
}
