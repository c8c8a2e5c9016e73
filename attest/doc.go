// Package attest appraises evidence from a TPM: see VerifyEK and Appraise.
// It is pure: it opens no device, no file and no connection, and reads no clock.
package attest
