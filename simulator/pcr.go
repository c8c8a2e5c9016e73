package simulator

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"
)

// ExtendPCR extends a PCR of the SHA-256 bank with the digest of data, as
// firmware does when it measures something (TPM2_PCR_Extend, Part 3, section 22.2).
func (t *TPM) ExtendPCR(index int, data []byte) error {
	c, err := net.DialTimeout("unix", t.Address, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	digest := sha256.Sum256(data)
	cmd := []byte{0x80, 0x02, 0, 0, 0, 0, 0, 0, 0x01, 0x82}
	cmd = binary.BigEndian.AppendUint32(cmd, uint32(index))
	cmd = append(cmd, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0) // password session, empty
	cmd = append(cmd, 0, 0, 0, 1, 0x00, 0x0b)                   // one digest, TPM_ALG_SHA256
	cmd = append(cmd, digest[:]...)
	binary.BigEndian.PutUint32(cmd[2:], uint32(len(cmd)))
	if _, err := c.Write(cmd); err != nil {
		return err
	}
	head := make([]byte, 10)
	if _, err := io.ReadFull(c, head); err != nil {
		return err
	}
	if rc := binary.BigEndian.Uint32(head[6:]); rc != 0 {
		return fmt.Errorf("extending PCR %d: response code %#x", index, rc)
	}
	return nil
}
