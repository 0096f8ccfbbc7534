//! Calls about types of jobs.

use std::time::SystemTime;

use jobledger_proto::v1::{
    DeleteJobTypeRequest, GetJobTypeRequest, JobType, JobTypeSettings, ListJobTypesRequest, ListJobTypesResponse,
    Pause, PauseJobTypeRequest, ResumeJobTypeRequest, UpdateJobTypeRequest,
};
use prost_types::FieldMask;
use tonic::{Request, Response, Status};

use crate::{Client, Error, RawJobTypeClient};

/// What to pause or resume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PauseTarget {
    /// One type.
    Type(String),
    /// All types, those that are yet to come included.
    AllTypes,
}

impl PauseTarget {
    fn parts(self) -> (String, bool) {
        match self {
            Self::Type(name) => (name, false),
            Self::AllTypes => (String::new(), true),
        }
    }
}

impl<T: Into<String>> From<T> for PauseTarget {
    fn from(name: T) -> Self {
        Self::Type(name.into())
    }
}

impl Client {
    /// Reads a page of types, in the order of their names. Send the answer's `next_page_token` as `page_token` to read the next
    /// page.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn job_types(&self, list: ListJobTypesRequest) -> Result<ListJobTypesResponse, Error> {
        self.on_types(list, |mut types, request| async move { types.list_job_types(request).await }).await
    }

    /// Reads one type, with its counts, settings and pause.
    ///
    /// # Errors
    ///
    /// [`Error::JobTypeNotFound`], [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn job_type(&self, name: impl Into<String>) -> Result<JobType, Error> {
        let request = GetJobTypeRequest { r#type: name.into() };
        let answer =
            self.on_types(request, |mut types, request| async move { types.get_job_type(request).await }).await?;
        answer.job_type.ok_or_else(|| Error::without("the type"))
    }

    /// Sets the description of a type, which need not exist yet.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Exhausted`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn describe(&self, name: impl Into<String>, description: impl Into<String>) -> Result<(), Error> {
        let request = UpdateJobTypeRequest {
            r#type: name.into(),
            settings: Some(JobTypeSettings { description: description.into() }),
            update_mask: Some(FieldMask { paths: vec!["description".to_owned()] }),
            etag: String::new(),
        };
        self.on_types(request, |mut types, request| async move { types.update_job_type(request).await }).await.map(drop)
    }

    /// Removes all settings of a type, and ends its pause.
    ///
    /// # Errors
    ///
    /// [`Error::JobTypeNotFound`], [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn reset_type(&self, name: impl Into<String>) -> Result<(), Error> {
        let request = DeleteJobTypeRequest { r#type: name.into(), etag: String::new() };
        self.on_types(request, |mut types, request| async move { types.delete_job_type(request).await }).await.map(drop)
    }

    /// Pauses a type, or all types: once this returns, no server hands out their jobs. The pause ends with [`Client::resume`],
    /// or at the time `until`. `reason` is for people.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Exhausted`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn pause(
        &self,
        target: impl Into<PauseTarget>,
        reason: impl Into<String>,
        until: Option<SystemTime>,
    ) -> Result<Pause, Error> {
        let (r#type, all_types) = target.into().parts();
        let (reason, until) = (reason.into(), until.map(Into::into));
        let request = PauseJobTypeRequest { r#type, all_types, until, reason, etag: String::new() };
        let answer =
            self.on_types(request, |mut types, request| async move { types.pause_job_type(request).await }).await?;
        answer.pause.ok_or_else(|| Error::without("the pause"))
    }

    /// Ends a pause, and wakes workers that wait. Succeeds if there is none.
    ///
    /// # Errors
    ///
    /// [`Error::JobTypeNotFound`], [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn resume(&self, target: impl Into<PauseTarget>) -> Result<(), Error> {
        let (r#type, all_types) = target.into().parts();
        let request = ResumeJobTypeRequest { r#type, all_types, etag: String::new() };
        self.on_types(request, |mut types, request| async move { types.resume_job_type(request).await }).await.map(drop)
    }

    /// Sends a request about types. Each may be repeated: the second time it changes nothing.
    async fn on_types<Req, Res, F>(
        &self,
        message: Req,
        send: impl Fn(RawJobTypeClient, Request<Req>) -> F,
    ) -> Result<Res, Error>
    where
        Req: Clone,
        F: Future<Output = Result<Response<Res>, Status>>,
    {
        self.call_on(&self.raw_job_types(), self.timeout(), message, true, send).await
    }
}
