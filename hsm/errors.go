package hsm

import (
	"errors"
	"fmt"
)

var (
	// ErrUnsupported: this binary was built without cgo, which PKCS#11 needs.
	ErrUnsupported = errors.New("PKCS#11 needs a build with cgo (CGO_ENABLED=1): this one has none")
	// ErrDeadline: the module did not answer in time; its worker was killed.
	ErrDeadline = errors.New("the PKCS#11 module did not answer in time")
	// ErrWorker: the worker process ended while it had the call.
	ErrWorker = errors.New("the PKCS#11 worker process ended")
	// ErrUnavailable: the token failed too often in a row; calls are refused
	// at once until it may be tried again.
	ErrUnavailable = errors.New("the PKCS#11 token is unavailable")
	// ErrPIN: the token refused the PIN. It is not tried again, since tokens
	// lock after a few wrong ones.
	ErrPIN = errors.New("the token refused the PIN")
	// ErrNotFound: the token has no such key, or more than one.
	ErrNotFound = errors.New("no such key in the token")
	// ErrWrongKey: another key stands where the key stood.
	ErrWrongKey = errors.New("another key stands behind this CKA_ID")
	// ErrWrongSignature: the token returned a signature that does not verify.
	// It was not released.
	ErrWrongSignature = errors.New("the token returned a signature that does not verify")
	// ErrClosed: the token was closed.
	ErrClosed = errors.New("the token is closed")
)

// AttributeError: a key's attribute is not what a key that never leaves its
// token must have.
type AttributeError struct {
	Attribute string // such as CKA_EXTRACTABLE
	Got       string // "true", "false" or "not reported"
	Want      string
}

func (e *AttributeError) Error() string {
	return fmt.Sprintf("key refused: %s is %s, %s is required", e.Attribute, e.Got, e.Want)
}

// CodeError is a return value of the module (PKCS#11 v2.40, section 5.1.6).
type CodeError struct {
	Code uint   // CKR_...
	Call string // what was asked of the worker
}

func (e *CodeError) Error() string {
	name := codeNames[e.Code]
	if name == "" {
		name = "return value"
	}
	return fmt.Sprintf("%s: %s (%#x)", e.Call, name, e.Code)
}

// Is makes PIN errors match ErrPIN.
func (e *CodeError) Is(target error) bool { return target == ErrPIN && classify(e.Code) == classPIN }

// class says what a return value calls for.
type class int

const (
	classOther    class = iota // returned to the caller
	classSession               // new worker, find the key again, retry once
	classThrottle              // may be a busy device: retry once; several in a row as classDevice
	classDevice                // new worker, rate-limited, and retry once
	classPIN                   // never retried
)

// Return values, PKCS#11 v2.40 header.
const (
	ckrGeneralError         = 0x05
	ckrFunctionFailed       = 0x06
	ckrDeviceError          = 0x30
	ckrDeviceRemoved        = 0x32
	ckrKeyHandleInvalid     = 0x60
	ckrObjectHandleInvalid  = 0x82
	ckrMechanismInvalid     = 0x70
	ckrOperationActive      = 0x90
	ckrPINIncorrect         = 0xa0
	ckrPINInvalid           = 0xa1
	ckrPINLenRange          = 0xa2
	ckrPINExpired           = 0xa3
	ckrPINLocked            = 0xa4
	ckrSessionClosed        = 0xb0
	ckrSessionHandleInvalid = 0xb3
	ckrTokenNotPresent      = 0xe0
	ckrTokenNotRecognized   = 0xe1
	ckrUserNotLoggedIn      = 0x101
	ckrNotInitialized       = 0x190
)

var codeNames = map[uint]string{
	ckrMechanismInvalid: "CKR_MECHANISM_INVALID",
	ckrGeneralError:     "CKR_GENERAL_ERROR", ckrFunctionFailed: "CKR_FUNCTION_FAILED", ckrDeviceError: "CKR_DEVICE_ERROR",
	ckrDeviceRemoved: "CKR_DEVICE_REMOVED", ckrKeyHandleInvalid: "CKR_KEY_HANDLE_INVALID", ckrObjectHandleInvalid: "CKR_OBJECT_HANDLE_INVALID",
	ckrOperationActive: "CKR_OPERATION_ACTIVE", ckrPINIncorrect: "CKR_PIN_INCORRECT", ckrPINInvalid: "CKR_PIN_INVALID",
	ckrPINLenRange: "CKR_PIN_LEN_RANGE", ckrPINExpired: "CKR_PIN_EXPIRED", ckrPINLocked: "CKR_PIN_LOCKED",
	ckrSessionClosed: "CKR_SESSION_CLOSED", ckrSessionHandleInvalid: "CKR_SESSION_HANDLE_INVALID", ckrTokenNotPresent: "CKR_TOKEN_NOT_PRESENT",
	ckrTokenNotRecognized: "CKR_TOKEN_NOT_RECOGNIZED", ckrUserNotLoggedIn: "CKR_USER_NOT_LOGGED_IN", ckrNotInitialized: "CKR_CRYPTOKI_NOT_INITIALIZED",
}

func classify(code uint) class {
	switch code {
	case ckrSessionHandleInvalid, ckrSessionClosed, ckrUserNotLoggedIn, ckrObjectHandleInvalid, ckrKeyHandleInvalid, ckrOperationActive:
		return classSession
	case ckrDeviceError, ckrFunctionFailed: // AWS CloudHSM answers DEVICE_ERROR when it throttles
		return classThrottle
	case ckrDeviceRemoved, ckrTokenNotPresent, ckrTokenNotRecognized, ckrGeneralError, ckrNotInitialized:
		return classDevice
	case ckrPINIncorrect, ckrPINInvalid, ckrPINLenRange, ckrPINExpired, ckrPINLocked:
		return classPIN
	}
	return classOther
}
