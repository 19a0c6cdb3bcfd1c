//! A headless Chromium on a host, driven as the WebDriver standard (<https://www.w3.org/TR/webdriver2/>) says.

use std::{fmt::Debug, fs, path::Path, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use integration::{Host, Process, await_ok};
use serde_json::{Value, json};

/// Where chromedriver listens; the host's network is its own.
const DRIVER: &str = "http://127.0.0.1:9515";
/// A browser takes a while to start, the more so on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(120);
/// The same for a few attempts.
const BROWSER: Duration = Duration::from_secs(240);
/// The key that an element reference is found by.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// No sandbox, since the scenarios run as root; and nothing that asks for hosts of the world outside.
const FLAGS: [&str; 9] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
];

/// A window, whose profile is in a folder of its own; ends with the Lab at the latest.
pub(crate) struct Browser {
    host: Host,
    session: String,
    _driver: Process,
}

impl Browser {
    #[track_caller]
    pub(crate) fn start(host: &Host, profiles: &Path, [width, height]: [u16; 2]) -> Self {
        let driver = host.spawn("chromedriver", &["--port=9515"]);
        await_ok("chromedriver to listen", SOON, || ask(host, "GET", "/status", &Value::Null));
        // It gives up a browser that takes a minute to start. The next one needs a profile that no other may still
        // hold.
        let mut attempt = 0;
        let session = await_ok("a browser", BROWSER, || {
            attempt += 1;
            let mut flags: Vec<String> = FLAGS.map(str::to_owned).into();
            flags.push(format!("--user-data-dir={}", profiles.join(attempt.to_string()).display()));
            flags.push(format!("--window-size={width},{height}"));
            let wanted = json!({"capabilities": {"alwaysMatch": {"browserName": "chrome",
                "goog:chromeOptions": {"binary": "/usr/bin/chromium", "args": flags}}}});
            ask(host, "POST", "/session", &wanted)
        });
        let session = session["sessionId"].as_str().unwrap_or_else(|| panic!("no session: {session}"));
        Self { host: host.clone(), session: format!("/session/{session}"), _driver: driver }
    }

    #[track_caller]
    pub(crate) fn open(&self, url: &str) {
        self.post("/url", &json!({ "url": url }));
    }

    /// What a script returns.
    #[track_caller]
    pub(crate) fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", &json!({"script": script, "args": []}))
    }

    /// Waits until a script returns what is wanted.
    #[track_caller]
    pub(crate) fn await_value(
        &self,
        script: &str,
        wanted: &(impl Debug + ?Sized),
        is: impl Fn(&Value) -> bool,
    ) -> Value {
        await_ok(&format!("{wanted:?} from {script}"), SOON, || {
            let value = self.run(script);
            if is(&value) { Ok(value) } else { Err(value.to_string()) }
        })
    }

    /// Waits until the text of the element that `selector` finds contains this.
    #[track_caller]
    pub(crate) fn await_text(&self, selector: &str, part: &str) -> String {
        let script = format!("return document.querySelector({})?.innerText ?? null", json!(selector));
        let holds = |value: &Value| value.as_str().is_some_and(|text| text.contains(part));
        self.await_value(&script, part, holds).as_str().unwrap_or_default().to_owned()
    }

    /// Clicks where the element that `selector` finds is, as a mouse does.
    #[track_caller]
    pub(crate) fn click(&self, selector: &str) {
        self.act_on(selector, "click", &json!({}));
    }

    /// Types into the element that `selector` finds.
    #[track_caller]
    pub(crate) fn type_into(&self, selector: &str, text: &str) {
        self.act_on(selector, "value", &json!({ "text": text }));
    }

    /// What is seen, as a PNG file.
    #[track_caller]
    pub(crate) fn take_picture(&self, path: &Path) {
        let picture = ask(&self.host, "GET", &format!("{}/screenshot", self.session), &Value::Null);
        let picture = picture.unwrap_or_else(|error| panic!("no picture: {error}"));
        fs::write(path, STANDARD.decode(picture.as_str().unwrap_or_default()).unwrap()).unwrap();
    }

    /// Once more where the page has redrawn the element between the two commands.
    #[track_caller]
    fn act_on(&self, selector: &str, act: &str, body: &Value) {
        await_ok(&format!("{act} on {selector}"), SOON, || {
            let found = self.try_post("/element", &json!({"using": "css selector", "value": selector}))?;
            let element = found[ELEMENT].as_str().ok_or_else(|| found.to_string())?;
            self.try_post(&format!("/element/{element}/{act}"), body)
        });
    }

    #[track_caller]
    fn post(&self, path: &str, body: &Value) -> Value {
        self.try_post(path, body).unwrap_or_else(|error| panic!("{path} {body}: {error}"))
    }

    fn try_post(&self, path: &str, body: &Value) -> Result<Value, String> {
        ask(&self.host, "POST", &format!("{}{path}", self.session), body)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The Lab ends one that does not end by itself.
        let _ = ask(&self.host, "DELETE", &self.session, &Value::Null);
    }
}

/// A command to chromedriver, and the value of its answer.
fn ask(host: &Host, method: &str, path: &str, body: &Value) -> Result<Value, String> {
    let (url, body) = (format!("{DRIVER}{path}"), body.to_string());
    let mut command = vec!["curl", "-sS", "-m", "90", "-X", method, "-H", "Content-Type: application/json"];
    if method == "POST" {
        command.extend(["--data-binary", &body]);
    }
    command.push(&url);
    let output = host.try_run(&command);
    let answer: Value = serde_json::from_str(&output.stdout).map_err(|_| output.describe())?;
    match answer["value"]["error"].as_str() {
        Some(_) => Err(answer["value"].to_string()),
        None => Ok(answer["value"].clone()),
    }
}
