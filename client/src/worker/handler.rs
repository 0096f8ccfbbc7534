//! Handlers, stored without their input and output types.

use std::{future::Future, pin::Pin, sync::Arc};

use jobledger_proto::v1::Job;
use prost_types::{Value, value::Kind};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    Context,
    error::{Error, INVALID_PAYLOAD, INVALID_RESULT},
};
use crate::{from_value, json::to_field};

/// The result of a handler; `None` for a null result.
pub(super) type Output = Result<Option<Value>, Error>;

type Run = dyn Fn(Context, Job) -> Pin<Box<dyn Future<Output = Output> + Send>> + Send + Sync;

/// Runs one job per call. Calls run concurrently.
#[derive(Clone)]
pub(super) struct Handler(Arc<Run>);

impl Handler {
    pub(super) fn new<H, F, In, Out>(handler: H) -> Self
    where
        H: Fn(Context, In) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Out, Error>> + Send + 'static,
        In: DeserializeOwned + Send + 'static,
        Out: Serialize + Send + 'static,
    {
        let handler = Arc::new(handler);
        Self(Arc::new(move |context, job| {
            let handler = Arc::clone(&handler);
            Box::pin(async move {
                let input = from_value(job.payload.as_ref())
                    .map_err(|error| Error::permanent(format!("the payload: {error}")).code(INVALID_PAYLOAD))?;
                let output = handler(context, input).await?;
                let value =
                    to_field("result", &output).map_err(|error| Error::permanent(error).code(INVALID_RESULT))?;
                // A handler that returns `()` has a null result, which is not stored.
                Ok(Some(value).filter(|value| !matches!(value.kind, Some(Kind::NullValue(_)))))
            })
        }))
    }

    pub(super) fn run(&self, context: Context, job: Job) -> Pin<Box<dyn Future<Output = Output> + Send>> {
        (self.0)(context, job)
    }
}
