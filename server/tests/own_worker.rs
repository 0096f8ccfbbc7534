//! How to test your own worker against a server that runs in the test's process. Copy this file as a start.

use jobledger_client::{
    Client, Follow, JobStatus, NewJob, from_value,
    worker::{Context, Error, Worker},
};
use jobledger_server::InProcess;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

#[derive(Serialize, Deserialize)]
struct Order {
    cents: u32,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
struct Receipt {
    charged: u32,
}

/// The handler under test.
async fn charge(context: Context, order: Order) -> Result<Receipt, Error> {
    context.stage("charging");
    match order.cents {
        0 => Err(Error::permanent("nothing to charge").code("EMPTY_ORDER")),
        cents => Ok(Receipt { charged: cents }),
    }
}

#[tokio::test]
async fn orders_are_charged_and_empty_ones_refused() -> Result<(), Box<dyn std::error::Error>> {
    let server = InProcess::start().await?;
    let client = Client::new(server.endpoint())?;
    let (stop, stopped) = oneshot::channel::<()>();
    let worker = tokio::spawn(Worker::builder(client.clone()).handle("charge", charge).build().unwrap().run(async {
        let _ = stopped.await;
    }));

    let mut ended = Vec::new();
    for cents in [0, 1_250] {
        let created = client.create(NewJob::new("charge").payload(&Order { cents })?).await?;
        // A job's stream ends when the job has ended.
        let mut events = client.subscribe(Follow::job(&created.job.id)).await?;
        while let Some(item) = events.next().await {
            item?;
        }
        ended.push(client.get(created.job.id).await?);
    }
    let [empty, charged] = &ended[..] else { unreachable!("two jobs") };
    assert_eq!((empty.status(), empty.last_error_code.as_str()), (JobStatus::Failed, "EMPTY_ORDER"));
    assert_eq!(charged.status(), JobStatus::Succeeded);
    assert_eq!(from_value::<Receipt>(charged.result.as_ref())?, Receipt { charged: 1_250 });

    drop(stop);
    worker.await??;
    server.stop().await?;
    Ok(())
}
