//! The page for browsers, in a real one.
//!
//! ```text
//!   east1 ─┐                                ┌─ west1
//!    Chromium├─ switch ──── router ──── switch ┤       laptop: an external peer that has never called
//!   east2 ─┘                                └─ west2
//! ```

#![allow(clippy::unwrap_used, reason = "a test's own steps may unwrap")]

mod browser;

use std::{env, path::Path};

use browser::{Browser, SOON};
use integration::{
    Host, Meshd, key_pair,
    topology::{CONFIG, Mesh, TwoSites},
};
use serde_json::{Value, json};

const FLAG: &str = "--ui-addr 127.0.0.1:9474";
const PAGE: &str = "http://127.0.0.1:9474/";
/// A key of an invalid record; its name gets into a problem's cause.
const HOSTILE: &str = "/meshd/peers/<img src=x onerror=document.title='owned'>";

/// `PICTURE=FILE` keeps what the browser shows; docs/ui.png is made by it.
#[test]
fn a_browser_shows_nodes_and_links_and_a_click_tells_more() {
    let mesh = Mesh::start_on(TwoSites::new("ui"), CONFIG, |node| node.args(FLAG));
    mesh.await_all_reach_each_other();
    let laptop = json!({"publicKey": key_pair(mesh.node("east1").host()).1, "allowedIPs": ["10.245.0.7/32"]});
    mesh.etcd.put("/meshd/peers/laptop", &laptop.to_string());
    let node = mesh.node("east1");
    let browser = Browser::start(node.host(), &mesh.sites.lab.folder().join("browser"), [1600, 1000]);
    browser.open(PAGE);

    // Nodes, their paths, and that an echo came back over each.
    let nodes = "return [...document.querySelectorAll('#map button[aria-label]')].map(node => node.ariaLabel).sort()";
    let wanted = [
        "east2: direct, answers",
        "laptop: wireguard, never connected",
        "west1: wireguard, answers",
        "west2: wireguard, answers",
    ];
    browser.await_value(nodes, &wanted, |found| *found == json!(wanted));
    browser.await_text("#title", "east1");
    for site in ["site east", "site west", "external peers"] {
        browser.await_text("#map", site);
    }

    // A line for each, with its round trip, and a rate where the tunnel counts one.
    let labels = "return [...document.querySelectorAll('#links g')].map(link => \
                  [link.getAttribute('class'), link.textContent])";
    let measured =
        |label: &str| label.split_once(" ms · ").is_some_and(|(ms, _)| ms.parse::<f64>().is_ok_and(|ms| ms > 0.0));
    browser.await_value(labels, "one direct and two tunnelled links", |found| {
        let of = |class: &str, end: &str| {
            let links = found.as_array().into_iter().flatten();
            let label = |link: &Value| link[1].as_str().is_some_and(|label| measured(label) && label.ends_with(end));
            links.filter(|link| link[0] == class && label(link)).count()
        };
        of("direct", "rate not measured") == 1 && of("wireguard", "B/s") == 2
    });

    // Fifty pings of a kilobyte in a second, and their answers, are some 100 kB/s.
    let pod = mesh.pod("west1").v4().to_string();
    let _traffic = mesh.pod("east1").spawn("ping", &["-q", "-i", "0.02", "-s", "1000", &pod]);
    browser.await_value(labels, "the rate of one link", |found| {
        let links = found.as_array().into_iter().flatten();
        let rates = links.filter_map(|link| link[1].as_str()?.strip_suffix(" kB/s")?.rsplit(' ').next()?.parse().ok());
        rates.filter(|rate: &f64| (50.0..200.0).contains(rate)).count() == 1
    });

    // A click on a node, and on a link.
    let west1 = node.peer("west1").unwrap();
    browser.click("#map button[aria-label^='west1:']");
    let details = browser.await_text("#details", "answers");
    for field in ["publicKey", "endpoint"] {
        let value = west1[field].as_str().unwrap();
        assert!(details.contains(value), "{field} {value}: {details}");
    }
    for subnet in west1["subnets"].as_array().unwrap() {
        assert!(details.contains(subnet.as_str().unwrap()), "{subnet}: {details}");
    }
    browser.await_text("#details", "echoes to");
    if let Some(path) = env::var_os("PICTURE") {
        browser.take_picture(Path::new(&path));
    }
    browser.type_into("#details", ESCAPE);
    browser.await_value("return document.querySelector('#details').hidden", "true", |hidden| *hidden == true);
    browser.run("document.querySelector('#links g.direct .touch').dispatchEvent(new MouseEvent('click'))");
    browser.await_text("#details h2", "east2");

    // The table finds.
    browser.type_into("#search", "west wireguard");
    browser.await_text("#found", "2 of 4");

    // What comes from others is text.
    mesh.etcd.put(HOSTILE, "{}");
    browser.await_text("#problems", "<img src=x");
    let wanted = json!([0, "east1: degraded – meshd"]);
    browser.await_value("return [document.images.length, document.title]", &wanted, |found| *found == wanted);

    // A node that has gone does not answer.
    mesh.node("west2").kill9();
    let silent = |node: &Value| node.as_str().is_some_and(|node| node.starts_with("west2: wireguard, no "));
    browser.await_value(nodes, "west2 without answer", |found| {
        found.as_array().is_some_and(|nodes| nodes.iter().any(silent))
    });
    browser.await_value("return document.querySelectorAll('#links g.wireguard.warn').length", "1", |count| *count == 1);
}

/// The key, as WebDriver writes it.
const ESCAPE: &str = "\u{e00c}";

#[test]
fn it_is_off_unless_asked_for_and_answers_to_no_other_name() {
    let sites = TwoSites::new("uihost");
    let etcd = sites.start_etcd(1);
    etcd.put("/meshd/config", CONFIG);
    let [on, off] = [0, 1].map(|nth| sites.east.hosts[nth].clone());
    let nodes = [Meshd::on(&on, &etcd).args(FLAG).start(), Meshd::on(&off, &etcd).start()];
    for node in &nodes {
        node.await_ready(SOON);
    }
    integration::await_until("the page", SOON, || (code(&on, &[PAGE]) == "200").then_some(()));
    assert_eq!(code(&off, &[PAGE]), "000");

    for path in ["", "v1/status", "v1/peers", "v1/echo?address=10.244.0.0&size=84"] {
        let url = format!("{PAGE}{path}");
        for host in ["Host: evil.example:9474", "Host: 127.0.0.1", "Host: 127.0.0.1:9473", "Host:"] {
            assert_eq!(code(&on, &["-H", host, &url]), "403", "{host} {path}");
        }
        assert_eq!(code(&on, &["-X", "POST", &url]), "405", "{path}");
        assert_eq!(code(&on, &["-X", "DELETE", &url]), "405", "{path}");
    }
    assert_eq!(code(&on, &["-H", "Sec-Fetch-Site: cross-site", &format!("{PAGE}v1/peers")]), "403");
    // Only what the page needs, and nothing outside of the mesh is asked.
    for path in ["v1/policies", "v1/attachments", "v1/peers/east1/config", "v1/echo?address=203.0.113.10&size=84"] {
        assert_eq!(code(&on, &[&format!("{PAGE}{path}")]), "404", "{path}");
    }
    let headers = on.run_args(&["curl", "-s", "-o", "/dev/null", "-D", "-", PAGE]).stdout;
    for header in
        ["content-security-policy: default-src 'none'", "frame-ancestors 'none'", "x-content-type-options: nosniff"]
    {
        assert!(headers.contains(header), "{header}: {headers}");
    }
    assert!(!headers.contains("access-control"), "{headers}");
}

/// The status code of an answer; 000 without one.
fn code(host: &Host, args: &[&str]) -> String {
    let command = [&["curl", "-s", "-o", "/dev/null", "-m", "10", "-w", "%{http_code}"], args].concat();
    host.try_run(&command).stdout
}
