//! The generated contract of jobledger: messages, and the client and server sides of `jobledger.v1.JobService`.
//!
//! The documentation of every item is that of the `.proto` files beside this one.

/// Package `jobledger.v1`.
pub mod v1 {
    #![allow(missing_docs, reason = "generated from the .proto files, where buf lint asks for the comments")]
    tonic::include_proto!("jobledger.v1");

    /// Omits the secret.
    impl std::fmt::Debug for CreateTokenResponse {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("CreateTokenResponse").field("token", &self.token).finish_non_exhaustive()
        }
    }
}

/// The encoded `google.protobuf.FileDescriptorSet` of the contract and its imports, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/jobledger_descriptor.bin"));
