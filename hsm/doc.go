// Package hsm holds keys in a PKCS#11 token: [Open] a token by its RFC 7512
// URI, then [Token.Key] gives a crypto.Signer and [Token.GenerateKey] makes one.
//
// The vendor's module never enters the calling process. It runs in a worker,
// a child process of the same binary that [RunWorker] serves, and that is
// killed when a call overruns its deadline. A module that hangs or crashes
// therefore costs one call's time, not the program. Each signature is verified
// with the key's public part before it is returned, and after each new worker
// the key is found again by its CKA_ID, its public key compared and its
// attributes read again.
//
// Without cgo the package builds, and Open returns [ErrUnsupported].
package hsm
