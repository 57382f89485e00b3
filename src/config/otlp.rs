//! Settings of traces, from a flag and the environment variables of OpenTelemetry.

use std::env::{self, VarError};

use anyhow::{Context, Result, bail, ensure};

use crate::telemetry::traces::TraceOptions;

/// Where to send traces; `None` if neither the flag nor the environment names a collector. Reads `OTEL_SDK_DISABLED`,
/// `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES` and
/// `OTEL_TRACES_SAMPLER_ARG`, as the OpenTelemetry specification describes them. An empty variable counts as unset.
///
/// # Errors
/// A value is not valid. The message names the flag or the variable.
pub fn trace_options_from_env(flag: Option<&str>) -> Result<Option<TraceOptions>> {
    trace_options(flag, |name| match env::var(name) {
        Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
        Err(VarError::NotPresent) => Ok(None),
        Err(error @ VarError::NotUnicode(_)) => Err(error).context(name.to_owned()),
    })
}

/// As [`trace_options_from_env`], with `variable` in place of the process's environment.
fn trace_options(
    flag: Option<&str>,
    variable: impl Fn(&str) -> Result<Option<String>>,
) -> Result<Option<TraceOptions>> {
    if variable("OTEL_SDK_DISABLED")?.is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Ok(None);
    }
    let (name, endpoint) = match (
        flag.filter(|url| !url.is_empty()),
        variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")?,
        variable("OTEL_EXPORTER_OTLP_ENDPOINT")?,
    ) {
        (Some(url), ..) => ("--otlp-endpoint", with_path(url)),
        (None, Some(url), _) => ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", url),
        (None, None, Some(url)) => ("OTEL_EXPORTER_OTLP_ENDPOINT", with_path(&url)),
        (None, None, None) => return Ok(None),
    };
    ensure!(
        ["http://", "https://"]
            .iter()
            .any(|scheme| endpoint.strip_prefix(scheme).is_some_and(|rest| !rest.starts_with('/'))),
        "{name} is {endpoint:?}; expected the URL of a collector, such as http://localhost:4318"
    );
    let ratio = match variable("OTEL_TRACES_SAMPLER_ARG")? {
        None => 1.0,
        Some(text) => match text.parse() {
            Ok(ratio) if (0.0..=1.0).contains(&ratio) => ratio,
            _ => bail!("OTEL_TRACES_SAMPLER_ARG is {text:?}; expected the share of traces to record, from 0 to 1"),
        },
    };
    let attributes = attributes(&variable("OTEL_RESOURCE_ATTRIBUTES")?.unwrap_or_default())?;
    let named = attributes.iter().find(|(name, _)| name == "service.name").map(|(_, value)| value.clone());
    let service_name = variable("OTEL_SERVICE_NAME")?.or(named).unwrap_or_else(|| "rerankd".to_owned());
    Ok(Some(TraceOptions { endpoint, service_name, attributes, ratio }))
}

/// A collector's URL with the path of traces.
fn with_path(url: &str) -> String {
    let url = url.trim_end_matches('/');
    if url.ends_with("/v1/traces") { url.to_owned() } else { format!("{url}/v1/traces") }
}

/// `name=value` pairs, separated by commas.
fn attributes(text: &str) -> Result<Vec<(String, String)>> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let pair = |pair: &str| match pair.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => Ok((name.trim().to_owned(), value.trim().to_owned())),
        _ => bail!("OTEL_RESOURCE_ATTRIBUTES: {pair:?} is not of the form name=value"),
    };
    pairs.map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(flag: Option<&str>, variables: &[(&str, &str)]) -> Result<Option<TraceOptions>> {
        trace_options(flag, |name| {
            Ok(variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
        })
    }

    #[test]
    fn traces_are_off_unless_a_collector_is_named() {
        assert_eq!(from(None, &[("OTEL_SERVICE_NAME", "a")]).unwrap(), None);
        assert_eq!(from(Some("http://c:4318"), &[("OTEL_SDK_DISABLED", "true")]).unwrap(), None);
    }

    #[test]
    fn the_flag_precedes_the_variables_and_base_urls_get_the_path_of_traces() {
        let (base, traces) =
            (("OTEL_EXPORTER_OTLP_ENDPOINT", "http://b:1/"), ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://t:2/x"));
        for (flag, variables, expected) in [
            (Some("http://f:3"), &[base, traces][..], "http://f:3/v1/traces"),
            (Some("http://f:3/v1/traces"), &[], "http://f:3/v1/traces"),
            (None, &[base, traces], "http://t:2/x"),
            (None, &[base], "http://b:1/v1/traces"),
        ] {
            assert_eq!(from(flag, variables).unwrap().unwrap().endpoint, expected);
        }
    }

    #[test]
    fn the_name_the_attributes_and_the_ratio_come_from_the_environment() {
        let options = from(
            Some("http://c:1"),
            &[
                ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=prod, service.name=a,team=x=y"),
                ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
            ],
        );
        let options = options.unwrap().unwrap();
        assert_eq!((options.service_name.as_str(), options.ratio), ("a", 0.25));
        assert_eq!(options.attributes[2], ("team".to_owned(), "x=y".to_owned()));
        let named =
            from(Some("http://c:1"), &[("OTEL_RESOURCE_ATTRIBUTES", "service.name=a"), ("OTEL_SERVICE_NAME", "b")]);
        assert_eq!(named.unwrap().unwrap().service_name, "b");
    }

    #[test]
    fn a_wrong_value_is_refused_with_its_name() {
        for (flag, variables, named) in [
            (Some("localhost:4318"), &[][..], "--otlp-endpoint"),
            (Some("http:///x"), &[], "--otlp-endpoint"),
            (None, &[("OTEL_EXPORTER_OTLP_ENDPOINT", "grpc://c")], "OTEL_EXPORTER_OTLP_ENDPOINT"),
            (Some("http://c"), &[("OTEL_TRACES_SAMPLER_ARG", "2")], "OTEL_TRACES_SAMPLER_ARG"),
            (Some("http://c"), &[("OTEL_RESOURCE_ATTRIBUTES", "a")], "OTEL_RESOURCE_ATTRIBUTES"),
        ] {
            assert!(from(flag, variables).unwrap_err().to_string().contains(named), "{named}");
        }
    }
}
