package tpm

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Where record counters are: a part of the range that the TCG's registry
// leaves to owners (Registry of Reserved TPM 2.0 Handles, section 2.2.2).
const (
	firstCounter = 0x01910000
	lastCounter  = 0x0191ffff
)

// Errors of counters.
var (
	ErrNoCounter    = errors.New("the TPM has no such counter")
	ErrOtherCounter = errors.New("the NV index is used for something else")
)

// CounterIndex is the NV index of the counter with a name: names are few, and
// whoever configures several compares their indexes.
func CounterIndex(name string) uint32 {
	sum := sha256.Sum256([]byte("inkan record counter v1\x00" + name))
	return firstCounter + uint32(binary.BigEndian.Uint16(sum[:]))
}

// Counter is a counter in the TPM that only goes up, not even back by being
// undefined and made again (Part 1, section 37.2.4). It is orderly: the TPM
// keeps it in memory and writes it at an orderly shutdown, or when its low bits
// overflow, so that it does not wear out. After a shutdown that was not orderly it has jumped up,
// by less than [CounterReading].Slack.
type Counter struct {
	device *Device
	index  tpm2.TPMHandle
}

// CounterReading is what a counter says.
type CounterReading struct {
	Value    uint64   // 0: never incremented
	Device   [32]byte // SHA-256 of the TPM's storage root key: names the TPM
	Resets   uint32   // resetCount of the TPM
	Restarts uint32   // restartCount
	Slack    uint64   // how far it may jump when the TPM loses power
}

// Counter returns the counter with a name. Nothing is asked of the TPM.
func (d *Device) Counter(name string) *Counter {
	return &Counter{device: d, index: tpm2.TPMHandle(CounterIndex(name))}
}

// public is the counter's definition. Whoever can use the TPM increments and
// reads it with the empty authorization: to increment it makes a signer refuse, and gains
// nothing; to undefine it takes the owner's authorization. noDA: nobody can lock it.
func (c *Counter) public(written bool) tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: c.index, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
		Attributes: tpm2.TPMANV{AuthWrite: true, AuthRead: true, OwnerRead: true, NoDA: true, Orderly: true, NT: tpm2.TPMNTCounter, Written: written},
	}
}

// find returns whether the counter was incremented before, and its Name.
func (c *Counter) find() (h tpm2.AuthHandle, written bool, err error) {
	rsp, err := tpm2.NVReadPublic{NVIndex: c.index}.Execute(c.device.link)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return h, false, answered{ErrNoCounter}
	}
	if err != nil {
		return h, false, err
	}
	p, err := rsp.NVPublic.Contents()
	if err != nil {
		return h, false, err
	}
	written = p.Attributes.Written
	want := c.public(written)
	if string(tpm2.Marshal(*p)) != string(tpm2.Marshal(want)) {
		return h, false, answered{fmt.Errorf("%w: %#x is there and is no record counter: free it (tpm2_nvundefine)", ErrOtherCounter, uint32(c.index))}
	}
	return tpm2.AuthHandle{Handle: c.index, Name: rsp.NVName, Auth: tpm2.PasswordAuth(nil)}, written, nil
}

// Make makes the counter if there is none. It takes the owner's authorization.
func (c *Counter) Make() error {
	return c.device.do("making a record counter", func() error {
		_, _, err := c.find()
		if !errors.Is(err, ErrNoCounter) {
			return err
		}
		owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(c.device.options.OwnerAuth)}
		_, err = tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(c.public(false))}.Execute(c.device.link)
		return explainHierarchy("making a record counter", err)
	})
}

// Read reads the counter, or gives [ErrNoCounter].
func (c *Counter) Read() (r CounterReading, err error) {
	err = c.device.do("reading a record counter", func() error {
		h, written, err := c.find()
		if err != nil {
			return err
		}
		r = CounterReading{}
		if written {
			if r.Value, err = c.read(h); err != nil {
				return err
			}
		}
		fixed, err := c.device.properties(uint32(tpm2.TPMPTFamilyIndicator))
		if err != nil {
			return err
		}
		r.Slack = uint64(fixed[tpm2.TPMPTOrderlyCount])
		clock, err := tpm2.ReadClock{}.Execute(c.device.link)
		if err != nil {
			return err
		}
		r.Resets, r.Restarts = clock.CurrentTime.ClockInfo.ResetCount, clock.CurrentTime.ClockInfo.RestartCount
		return c.device.withSRK(func(_ tpm2.NamedHandle, public []byte) error {
			r.Device = sha256.Sum256(public)
			return nil
		})
	})
	return r, err
}

func (c *Counter) read(h tpm2.AuthHandle) (uint64, error) {
	rsp, err := tpm2.NVRead{AuthHandle: h, NVIndex: tpm2.NamedHandle{Handle: h.Handle, Name: h.Name}, Size: 8}.Execute(c.device.link)
	if err != nil {
		return 0, err
	}
	if len(rsp.Data.Buffer) != 8 {
		return 0, errors.New("the counter does not have eight bytes")
	}
	return binary.BigEndian.Uint64(rsp.Data.Buffer), nil
}

// Advance increments the counter from the value that it has to target, and returns
// its value then. If it has another value than from, that is returned, nothing is done, and
// moved is false: somebody else has incremented it. From 0, never incremented, it is incremented once, and the TPM
// chooses the value.
func (c *Counter) Advance(from, target uint64) (value uint64, moved bool, err error) {
	err = c.device.do("incrementing a record counter", func() error {
		h, written, err := c.find()
		if err != nil {
			return err
		}
		value = 0
		if written {
			if value, err = c.read(h); err != nil {
				return err
			}
		}
		if value != from && !moved {
			return nil
		}
		moved = true // the sequence may run twice, and the first run may have got anywhere
		for value == 0 || from != 0 && value < target {
			if _, err := (tpm2.NVIncrement{AuthHandle: h, NVIndex: tpm2.NamedHandle{Handle: h.Handle, Name: h.Name}}).Execute(c.device.link); err != nil {
				return err
			}
			if !written { // its Name is another one now
				if h, written, err = c.find(); err != nil {
					return err
				}
			}
			if value, err = c.read(h); err != nil {
				return err
			}
		}
		return nil
	})
	return value, moved, err
}
