//! HTTP as far as the tests need it.

use std::net::TcpListener;
use std::time::Duration;

/// An address that nobody listens on.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").to_string()
}

/// Status and body of a GET; none: nobody answers.
pub async fn try_get(url: &str) -> Option<(u16, String)> {
    let url = url.to_owned();
    tokio::task::spawn_blocking(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(20)))
            .build()
            .into();
        let mut response = agent.get(&url).call().ok()?;
        let status = response.status().as_u16();
        Some((status, response.body_mut().read_to_string().ok()?))
    })
    .await
    .expect("a request")
}

/// The same, of somebody who is about to listen.
pub async fn get(url: &str) -> (u16, String) {
    for _ in 0..300 {
        if let Some(answer) = try_get(url).await {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{url}: no answer");
}
