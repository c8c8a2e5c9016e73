package binding

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"unicode/utf8"

	"inkan/internal/strictjson"
)

// Maxima of a WebSocket text, in bytes. A text in JSON may take six times its size.
const (
	MaxText  = 64 << 10  // of the venue's own message
	MaxFrame = 512 << 10 // with the action beside it
)

// Frame is the text of a WebSocket message (RFC 6455, section 5.6): the venue's own
// message, as a text, and beside it the signed action.
type Frame struct {
	Action  string `json:"agent_action"` // JWS in compact serialisation
	Message string `json:"message"`      // exactly what the venue would get alone
}

// TextDigest is what an action of the format ws-text has in native: the SHA-256 of
// the message's UTF-8, not of the JSON string that it stands in.
func TextDigest(message []byte) [32]byte { return sha256.Sum256(message) }

func (f *Frame) validate() error {
	switch {
	case f.Action == "":
		return errors.New("frame: agent_action is missing")
	case f.Message == "":
		return errors.New("frame: message is missing")
	case len(f.Message) > MaxText:
		return fmt.Errorf("frame: message has %d bytes, at most %d are allowed", len(f.Message), MaxText)
	case !utf8.ValidString(f.Message):
		return errors.New("frame: message is not UTF-8")
	}
	return nil
}

// ParseFrame reads a frame: a JSON object with exactly these two members.
func ParseFrame(text []byte) (*Frame, error) {
	var f Frame
	if err := strictjson.Unmarshal(text, MaxFrame, &f); err != nil {
		return nil, fmt.Errorf("frame: %w", err)
	}
	return &f, f.validate()
}

// NewFrame puts a signed action beside a message.
func NewFrame(message []byte, action string) ([]byte, error) {
	f := Frame{action, string(message)}
	if err := f.validate(); err != nil {
		return nil, err
	}
	b, err := strictjson.Marshal(&f)
	if err == nil && len(b) > MaxFrame {
		err = fmt.Errorf("frame: %d bytes, at most %d are allowed", len(b), MaxFrame)
	}
	return b, err
}
